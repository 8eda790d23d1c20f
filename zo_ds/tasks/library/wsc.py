"""WSC: whether a pronoun refers to a noun."""

from __future__ import annotations

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.task import Sizes, Task

_WORDS = ("No", "Yes")


def _read(row: Row) -> list[Example]:
    pronoun, noun = row.text("span2_text").lower(), row.text("span1_text")
    return [
        Example(
            text=row.text("text").lstrip(),
            label=row.label("label", ("False", "True")),
            after=f'\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n',
            options=_WORDS,
            neutral="",
            where=row.where,
        )
    ]


WSC = Task(
    name="wsc",
    read=_read,
    label_words=_WORDS,
    template='{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    hub=("aps/super_glue", "wsc.fixed"),
    # Fewer than 1000 rows are left beside dev; the published runs train on all of them.
    sizes=Sizes(dev=500, test=1000),
    dev_from_train=True,
)
