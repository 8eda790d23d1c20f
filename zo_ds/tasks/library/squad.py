"""SQuAD: answer a question with words of a passage."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import MEZO_SIZES, Metric, Objective, Task


def _read(row: Row) -> list[Example]:
    accepted = row.texts("answers.text")
    return [
        Example(
            text=row.text("context"),
            label=0,
            before=f"Title: {row.text('title')}\nContext: ",
            after=f"\nQuestion: {row.text('question').strip()}\nAnswer:",
            options=(f" {accepted[0]}\n",),
            answers=accepted,
            where=row.where,
        )
    ]


SQUAD = Task(
    name="squad",
    read=_read,
    template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    objective=Objective.ANSWER,
    metric=Metric.F1,
    hub=("rajpurkar/squad", None),
    sizes=MEZO_SIZES,
    max_new_tokens=50,
    dev_from_train=True,
)
