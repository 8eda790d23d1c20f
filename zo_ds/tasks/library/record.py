"""ReCoRD: which entity of a passage fills the gap in a statement about it."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.errors import DataError
from zo_ds.tasks.task import MEZO_SIZES, Objective, Task

_GAP = "@placeholder"


def _read(row: Row) -> list[Example]:
    query, entities, right = row.text("query"), row.texts("entities"), row.texts("answers")
    if _GAP not in query:
        raise DataError(f"'query' has no {_GAP}", where=row.where, why=f"found {query!r}")
    # An entity that is named twice is still one option.
    filled = {entity: " " + query.replace(_GAP, entity).rstrip(" ") for entity in entities}
    if strangers := [entity for entity in right if entity not in filled]:
        raise DataError("an answer is not one of 'entities'", where=row.where, why=f"'answers' has {strangers[0]!r}")
    return [
        Example(
            text=row.text("passage").replace("@highlight\n", "- ").lstrip(),
            # The published runs learn the first one of several right entities; any of them counts as right.
            label=list(filled).index(right[0]),
            after="\n-",
            options=tuple(filled.values()),
            answers=tuple(filled[entity] for entity in right),
            neutral="-",
            where=row.where,
        )
    ]


RECORD = Task(
    name="record",
    read=_read,
    template="{passage}\n-",
    objective=Objective.ANSWER,
    hub=("aps/super_glue", "record"),
    sizes=MEZO_SIZES,
    dev_from_train=True,
)
