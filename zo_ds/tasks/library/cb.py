"""CB: whether the writer of a passage is committed to a clause in it."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import Sizes, Task

_CLASSES = ("entailment", "contradiction", "neutral")
_WORDS = ("Yes", "No", "Maybe")


def _read(row: Row) -> list[Example]:
    return [
        Example(
            text=row.text("premise"),
            label=row.label("label", _CLASSES),
            before="Suppose ",
            after=f' Can we infer that "{row.text("hypothesis")}"? Yes, No, or Maybe?\n',
            options=_WORDS,
            neutral="",
            where=row.where,
        )
    ]


CB = Task(
    name="cb",
    read=_read,
    label_words=_WORDS,
    template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    hub=("aps/super_glue", "cb"),
    # Fewer than 1000 rows are left beside dev; the published runs train on all of them.
    sizes=Sizes(dev=100, test=1000),
    dev_from_train=True,
)
