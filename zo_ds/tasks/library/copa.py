"""COPA: which of two sentences is the cause or the effect of a third."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.errors import DataError
from zo_ds.tasks.task import Objective, Sizes, Task

_CHOICES = ("choice1", "choice2")
_CONJUNCTIONS = {"effect": "so", "cause": "because"}


def _read(row: Row) -> list[Example]:
    question = row.text("question")
    if question not in _CONJUNCTIONS:
        raise DataError(
            f"the question {question!r} is not one of the task's", where=row.where, why="it is 'cause' or 'effect'"
        )
    conjunction = _CONJUNCTIONS[question]
    return [
        Example(
            text=row.text("premise").strip().removesuffix("."),
            label=row.label("label", _CHOICES),
            after=f" {conjunction}",
            options=tuple(f" {_amid_a_sentence(row.text(choice))}" for choice in _CHOICES),
            neutral=conjunction,
            where=row.where,
        )
    ]


def _amid_a_sentence(choice: str) -> str:
    """The first word in lower case, unless it is "I"."""
    first, space, rest = choice.rstrip(" ").partition(" ")
    return f"{first if first == 'I' else first.lower()}{space}{rest}"


COPA = Task(
    name="copa",
    read=_read,
    template="{premise} so|because",
    objective=Objective.ANSWER,
    hub=("aps/super_glue", "copa"),
    # Fewer than 1000 rows are left beside dev; the published runs train on all of them.
    sizes=Sizes(dev=100, test=1000),
    dev_from_train=True,
)
