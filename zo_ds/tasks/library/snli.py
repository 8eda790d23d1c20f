"""SNLI: whether a sentence follows from the description of a picture."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.library.entailment import PAIR_TEMPLATE, THREE_WAY, THREE_WORDS, masked_pair
from zo_ds.tasks.task import Task


def _read(row: Row) -> list[Example]:
    # 785 pairs of the training set alone are marked so: the annotators did not agree, and there is no right answer.
    if row.value("label") == -1:
        return []
    return [masked_pair(row, ("premise", "hypothesis"), THREE_WAY, THREE_WORDS)]


SNLI_MASKED = Task(
    name="snli-masked",
    read=_read,
    label_words=THREE_WORDS,
    template=PAIR_TEMPLATE,
    hub=("stanfordnlp/snli", None),
    masked=True,
    dev_from_train=True,
)
