"""SST-2: whether a sentence of a film review is positive."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import MEZO_SIZES, Task

_CLASSES = ("negative", "positive")
_WORDS = ("terrible", "great")
_OPTIONS = (" terrible", " great")


def _read(row: Row) -> list[Example]:
    return [
        Example(
            text=row.text("sentence").strip(),
            label=row.label("label", _CLASSES),
            after=" It was",
            options=_OPTIONS,
            neutral="It was",
            where=row.where,
        )
    ]


def _read_masked(row: Row) -> list[Example]:
    # Sentences of GLUE end in a space, and the published masked runs leave it there.
    return [
        Example(
            text=row.text("sentence"),
            label=row.label("label", _CLASSES),
            after=" It was {mask}.",
            options=_OPTIONS,
            where=row.where,
        )
    ]


SST2 = Task(
    name="sst2",
    read=_read,
    label_words=_WORDS,
    template="{sentence} It was",
    hub=("nyu-mll/glue", "sst2"),
    sizes=MEZO_SIZES,
    dev_from_train=True,
)

SST2_MASKED = Task(
    name="sst2-masked",
    read=_read_masked,
    label_words=_WORDS,
    template="{sentence} It was {mask}.",
    hub=("nyu-mll/glue", "sst2"),
    masked=True,
    dev_from_train=True,
)
