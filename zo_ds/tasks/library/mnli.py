"""MNLI: whether a sentence follows from another one, in ten genres."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.library.entailment import PAIR_TEMPLATE, THREE_WAY, THREE_WORDS, masked_pair
from zo_ds.tasks.task import Task


def _read(row: Row) -> list[Example]:
    return [masked_pair(row, ("premise", "hypothesis"), THREE_WAY, THREE_WORDS)]


MNLI_MASKED = Task(
    name="mnli-masked",
    read=_read,
    label_words=THREE_WORDS,
    template=PAIR_TEMPLATE,
    hub=("nyu-mll/glue", "mnli"),
    masked=True,
    dev_from_train=True,
)
