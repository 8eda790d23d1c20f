"""An example as a model is asked: a prompt, and what answers it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Example:
    """A question and its answer.

    The prompt is ``before + text + after``; one that is too long for the model loses the end of `text`, never the
    template around it.

    Attributes:
        text: the part that may be cut.
        label: number of the right option; -1 where there are none to choose from.
        before, after: of the prompt; ``{mask}`` in one of them stands for the mask of a masked LM.
        options: answers to choose from, each with the space or line break that joins it to the prompt; one option is
            an answer to be learned rather than chosen.
        answers: texts that a generated answer is held against.
        neutral: the prompt without the example's own content, for calibration; None if the task has none.
        messages: (role, content) of a conversation, instead of a prompt.
        where: the row it comes from.
    """

    text: str
    label: int = -1
    before: str = ""
    after: str = ""
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    neutral: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    where: str = ""

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return f"{self.before}{self.text}{self.after}"


@dataclass(frozen=True)
class Splits:
    """train: steps are drawn from it; dev: chooses the best model; test: reported, never chosen by."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    def all(self) -> Sequence[Example]:
        """Every example."""
        return [*self.train, *self.dev, *self.test]


def examples_sha256(examples: Iterable[Example]) -> str:
    """SHA-256 of what examples say, in order, wherever they were found."""
    digest = hashlib.sha256()
    for example in examples:
        tree = asdict(example)
        del tree["where"]
        digest.update(json.dumps(tree, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
