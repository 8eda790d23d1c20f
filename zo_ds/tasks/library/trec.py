"""TREC: what kind of thing a question asks for."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import Task

_CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
"""Classes of the column 'coarse_label'. Older copies number them in another way, in a column 'label-coarse'."""


def _read(row: Row) -> list[Example]:
    return [
        Example(
            text=row.text("text"),
            label=row.label("coarse_label", _CLASSES),
            before="{mask}: ",
            options=(" Expression", " Entity", " Description", " Human", " Location", " Number"),
            where=row.where,
        )
    ]


TREC_MASKED = Task(
    name="trec-masked",
    read=_read,
    label_words=("Expression", "Entity", "Description", "Human", "Location", "Number"),
    template="{mask}: {text}",
    hub=("CogComp/trec", None),
    masked=True,
)
