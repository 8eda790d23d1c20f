"""BoolQ: a yes/no question about a passage."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import MEZO_SIZES, Task

_WORDS = ("Yes", "No")


def _read(row: Row) -> list[Example]:
    question = row.text("question")
    if not question.endswith("?"):
        question += "?"
    # BoolQ's own files have 'answer', those of SuperGLUE 'label'; in both 1 and True mean yes, which is option 0.
    true = row.label("answer" if row.has("answer") else "label", ("False", "True"))
    return [
        Example(
            text=row.text("passage").lstrip(),
            label=1 - true,
            after=f" {question[0].upper()}{question[1:]}\n",
            options=_WORDS,
            neutral="",
            where=row.where,
        )
    ]


BOOLQ = Task(
    name="boolq",
    read=_read,
    label_words=_WORDS,
    template="{passage} {question}?\n",
    hub=("google/boolq", None),
    sizes=MEZO_SIZES,
    dev_from_train=True,
)
