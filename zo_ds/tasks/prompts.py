"""Prompts as tokens: rendered, cut to the model's limit with a count, padded to a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zo_ds.errors import ConfigError

Tokenizer = Any
"""A transformers fast tokenizer."""


class PromptEncoder:
    """Turns texts into token ids that fit the model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        render: from text to prompt.
        max_tokens: what a prompt may have, special tokens included, answer excluded.

    Attributes:
        truncated: how many different texts were cut so far.

    Raises:
        ConfigError: nothing of a text would fit beside the template.
    """

    def __init__(self, tokenizer: Tokenizer, render: Callable[[str], str], max_tokens: int) -> None:
        self._tokenizer, self._render, self._max_tokens = tokenizer, render, max_tokens
        self._encoded: dict[str, list[int]] = {}
        self.truncated = 0
        overhead = len(tokenizer(render(""))["input_ids"])
        if overhead >= max_tokens:
            raise ConfigError(
                f"the template alone takes {overhead} of {max_tokens} tokens",
                where="data.max_length",
                remedy="raise it (up to the model's limit) or shorten task.template",
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of the prompt; a text that is too long loses its end, never the template."""
        if text not in self._encoded:
            ids: list[int] = self._tokenizer(self._render(text))["input_ids"]
            if len(ids) > self._max_tokens:
                self.truncated += 1
                ids = self._shorten(text, len(ids) - self._max_tokens)
            self._encoded[text] = ids
        return self._encoded[text]

    def _shorten(self, text: str, excess: int) -> list[int]:
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = len(offsets) - excess
        while True:
            head = text[: offsets[keep - 1][1]] if keep > 0 else ""
            ids: list[int] = self._tokenizer(self._render(head))["input_ids"]
            if len(ids) <= self._max_tokens:
                return ids
            # Tokens may split differently where the text was cut, so one more may be needed.
            keep -= 1
