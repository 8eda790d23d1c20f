"""Prompts as tokens: cut to the model's limit, with a count of those that were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zo_ds.data.examples import Example
from zo_ds.errors import DataError

Tokenizer = Any
"""A transformers fast tokenizer."""
MASK = "{mask}"
"""Stands for the mask in the prompt of a masked LM."""


class PromptEncoder:
    """Turns prompts into token ids that fit the model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        max_tokens: what a sequence may have, special tokens and answer included.

    Attributes:
        cut: what was cut so far: prompts, and whole texts.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._encoded: dict[tuple[str, int], list[int]] = {}
        self.cut: set[Example] = set()

    @property
    def truncated(self) -> int:
        """How many different examples were cut so far."""
        return len(self.cut)

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, example: Example, room: int = 0) -> list[int]:
        """Token ids of the prompt; one that is too long loses the end of `Example.text`, never the template.

        Args:
            example: whose prompt.
            room: tokens that must stay free for the answer.

        Raises:
            DataError: nothing of the text fits beside the template.
        """
        key = (example.prompt, room)
        if key not in self._encoded:
            ids = self._ids(example)
            excess = len(ids) + room - self.max_tokens
            if excess > 0:
                self.cut.add(example)
                ids = self._shorten(example, room, excess)
            self._encoded[key] = ids
        return self._encoded[key]

    def _ids(self, example: Example) -> list[int]:
        mask = self._tokenizer.mask_token
        if mask is None:
            ids: list[int] = self._tokenizer(example.prompt)["input_ids"]
            return ids
        before, after = (part.replace(MASK, mask) for part in (example.before, example.after))
        # A mask in the text itself would be taken for the one that asks.
        masked: list[int] = self._tokenizer(f"{before}{example.text.replace(mask, ' ')}{after}")["input_ids"]
        return masked

    def _shorten(self, example: Example, room: int, excess: int) -> list[int]:
        text = example.text
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = len(offsets) - excess
        while True:
            head = text[: offsets[keep - 1][1]] if keep > 0 else ""
            ids = self._ids(replace(example, text=head))
            if len(ids) + room <= self.max_tokens:
                return ids
            if keep <= 0:
                raise DataError(
                    f"a prompt without its text takes {len(ids)} tokens and its answer {room}, the limit is "
                    f"{self.max_tokens}",
                    where=example.where or "data.max_length",
                    remedy="raise data.max_length (up to the model's limit), or shorten the template",
                )
            # Tokens may split differently where the text was cut, so one more may be needed.
            keep -= 1
