"""WiC: whether a word means the same in two sentences."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import MEZO_SIZES, Task

_WORDS = ("No", "Yes")


def _read(row: Row) -> list[Example]:
    return [
        Example(
            text=f"{row.text('sentence1')}\n{row.text('sentence2')}",
            label=row.label("label", ("False", "True")),
            before=f'Does the word "{row.text("word")}" have the same meaning in these two sentences? Yes, No?\n',
            after="\n",
            options=_WORDS,
            neutral="",
            where=row.where,
        )
    ]


WIC = Task(
    name="wic",
    read=_read,
    label_words=_WORDS,
    template='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
    "{sentence1}\n{sentence2}\n",
    hub=("aps/super_glue", "wic"),
    sizes=MEZO_SIZES,
    dev_from_train=True,
)
