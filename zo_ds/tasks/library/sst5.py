"""SST-5: how positive a sentence of a film review is, in five grades."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import Task

_CLASSES = ("very negative", "negative", "neutral", "positive", "very positive")


def _read(row: Row) -> list[Example]:
    return [
        Example(
            text=row.text("text"),
            label=row.label("label", _CLASSES),
            after=" It was {mask}.",
            options=(" terrible", " bad", " okay", " good", " great"),
            where=row.where,
        )
    ]


SST5_MASKED = Task(
    name="sst5-masked",
    read=_read,
    label_words=("terrible", "bad", "okay", "good", "great"),
    template="{text} It was {mask}.",
    hub=("SetFit/sst5", None),
    masked=True,
)
