"""A classification head answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.tasks.batch import EMPTY, Batch, ask, in_order
from zo_ds.tasks.layout import padded
from zo_ds.tasks.scorer import Scorer


class Head(Scorer):
    """Encoder or decoder with a classification head, which looks for the end or the start of a row: never packed."""

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        rows = [self.prompts.encode(example) for example in examples]
        layout = padded(rows, self._pad_id, grouped=not self.lockstep)
        labels = torch.tensor([example.label for example in examples])
        return Batch(ask(layout, [(number, 0, number) for number in range(len(rows))]), labels, EMPTY, EMPTY)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`."""
        config: Any = getattr(model, "config", None)
        if config is not None and config.pad_token_id is None:
            # Decoders find the last token of a row by it.
            config.pad_token_id = self._pad_id
        return in_order(batch, [model(**asked.inputs).logits[asked.rows].float() for asked in batch.asked])
