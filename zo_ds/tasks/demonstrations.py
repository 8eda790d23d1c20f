"""Answered examples before the question: in-context learning (arXiv 2005.14165; 32 of them in arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zo_ds.data.examples import Example
from zo_ds.data.shuffle import salted, shuffled
from zo_ds.tasks.prompts import PromptEncoder

SEPARATOR = "\n\n"


class Demonstrations:
    """Puts the same answered examples before every prompt, as many as fit.

    Args:
        examples: to draw from, without repetition.
        shots: how many.
        seed: which ones.
        prompts: knows the tokenizer and the limit.

    Attributes:
        dropped: prompts that hold fewer.
    """

    def __init__(self, examples: Sequence[Example], shots: int, seed: int, prompts: PromptEncoder) -> None:
        drawn = shuffled(range(len(examples)), salted(seed))[:shots]
        self._shown = [answered(examples[number]) + SEPARATOR for number in drawn]
        self._prompts, self._shots = prompts, shots
        self._lengths = [prompts.count(text) for text in self._shown]
        self.dropped = 0

    def before(self, example: Example, room: int) -> Example:
        """The example with demonstrations before it; the first ones are dropped where they do not fit.

        Args:
            example: what is asked.
            room: tokens that must stay free for the answer.
        """
        asked, own = self._prompts.encode(example, room), self._prompts.count(example.prompt)
        free = left = self._prompts.max_tokens - room - len(asked)
        count = 0
        while count < len(self._shown) and self._lengths[-count - 1] <= left:
            left -= self._lengths[-count - 1]
            count += 1
        # Tokens of the whole may be more than those of its parts: two line breaks are often one token only at the end.
        while count and self._prompts.count(self._text(count) + example.prompt) - own > free:
            count -= 1
        self.dropped += count < self._shots
        shown = self._text(count)
        neutral = None if example.neutral is None else f"{shown}{example.neutral}"
        return replace(example, before=f"{shown}{example.before}", neutral=neutral)

    def _text(self, count: int) -> str:
        return "".join(self._shown[len(self._shown) - count :])


def answered(example: Example) -> str:
    """A prompt with its right answer."""
    answer = example.options[example.label] if example.options else f" {example.answers[0]}"
    return f"{example.prompt}{answer}".rstrip("\n")
