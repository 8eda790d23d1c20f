"""MultiRC: whether an answer to a question about a paragraph is right. A row holds one of a question's answers."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import MEZO_SIZES, Task

_WORDS = ("No", "Yes")


def _read(row: Row) -> list[Example]:
    question, answer = row.text("question"), row.text("answer")
    return [
        Example(
            text=row.text("paragraph").lstrip(),
            label=row.label("label", ("False", "True")),
            after=f'\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
            options=_WORDS,
            neutral="",
            where=row.where,
        )
    ]


MULTIRC = Task(
    name="multirc",
    read=_read,
    label_words=_WORDS,
    template='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    hub=("aps/super_glue", "multirc"),
    sizes=MEZO_SIZES,
    dev_from_train=True,
)
