"""The masked prompt that LM-BFF (arXiv 2012.15723) gives pairs of sentences."""

from __future__ import annotations

from collections.abc import Sequence

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row

PAIR_TEMPLATE = "{premise}? {mask}, {hypothesis}"
"""The premise loses its last character, whatever it is; the hypothesis starts in lower case."""

THREE_WAY = ("entailment", "neutral", "contradiction")
"""Classes of SNLI and MNLI as the hub numbers them."""

THREE_WORDS = ("Yes", "Maybe", "No")
"""An answer for each of them."""


def masked_pair(row: Row, columns: tuple[str, str], classes: Sequence[str], words: Sequence[str]) -> Example:
    """Whether one sentence follows from another, asked through a mask.

    Args:
        row: with both sentences, and 'label'.
        columns: of the premise and of the hypothesis.
        classes: names of the labels.
        words: an answer for each class.

    Raises:
        DataError: a sentence or the label is missing or wrong.
    """
    premise, hypothesis = (row.text(column) for column in columns)
    return Example(
        text=premise[:-1],
        label=row.label("label", classes),
        after=f"? {{mask}}, {hypothesis[:1].lower()}{hypothesis[1:]}",
        options=tuple(f" {word}" for word in words),
        where=row.where,
    )
