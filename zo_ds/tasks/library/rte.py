"""RTE: whether a sentence follows from a passage."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.library.entailment import PAIR_TEMPLATE, masked_pair
from zo_ds.tasks.task import MEZO_SIZES, Task

_CLASSES = ("entailment", "not_entailment")
_WORDS = ("Yes", "No")


def _columns(row: Row) -> tuple[str, str]:
    """GLUE and SuperGLUE hold the same pairs under different names."""
    glue = ("sentence1", "sentence2")
    return glue if any(map(row.has, glue)) else ("premise", "hypothesis")


def _read(row: Row) -> list[Example]:
    premise, hypothesis = (row.text(column) for column in _columns(row))
    return [
        Example(
            text=premise.lstrip(),
            label=row.label("label", _CLASSES),
            after=f'\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            options=_WORDS,
            neutral="",
            where=row.where,
        )
    ]


def _read_masked(row: Row) -> list[Example]:
    return [masked_pair(row, _columns(row), _CLASSES, _WORDS)]


RTE = Task(
    name="rte",
    read=_read,
    label_words=_WORDS,
    template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    hub=("aps/super_glue", "rte"),
    sizes=MEZO_SIZES,
    dev_from_train=True,
)

RTE_MASKED = Task(
    name="rte-masked",
    read=_read_masked,
    label_words=_WORDS,
    template=PAIR_TEMPLATE,
    hub=("nyu-mll/glue", "rte"),
    masked=True,
    dev_from_train=True,
)
