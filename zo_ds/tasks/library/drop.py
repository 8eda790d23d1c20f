"""DROP: answer a question about a passage that takes counting, sorting or arithmetic."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import MEZO_SIZES, Metric, Objective, Task


def _read(row: Row) -> list[Example]:
    # An answer of several spans, and the answers of several annotators, stand in one list on the hub. The published
    # runs learn the first entry and accept each of them alone.
    accepted = row.texts("answers_spans.spans")
    return [
        Example(
            text=row.text("passage"),
            label=0,
            before="Passage: ",
            after=f"\nQuestion: {row.text('question').strip()}\nAnswer:",
            options=(f" {accepted[0]}\n",),
            answers=accepted,
            where=row.where,
        )
    ]


DROP = Task(
    name="drop",
    read=_read,
    template="Passage: {passage}\nQuestion: {question}\nAnswer:",
    objective=Objective.ANSWER,
    metric=Metric.F1,
    hub=("ucinlp/drop", None),
    sizes=MEZO_SIZES,
    max_new_tokens=50,
    dev_from_train=True,
)
