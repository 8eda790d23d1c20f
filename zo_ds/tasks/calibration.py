"""Surface-form calibration: what an option scores behind the prompt without content is subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError
from zo_ds.tasks.batch import Pair
from zo_ds.tasks.objectives import cross_entropy
from zo_ds.tasks.scorer import Call, Scorer, is_right


class Calibrated(Scorer):
    """Scores of another scorer less those of the neutral prompt (SFC, as in arXiv 2305.17333's zero-shot baselines).

    Args:
        inner: scores options.
    """

    def __init__(self, inner: Scorer) -> None:
        self._inner = inner
        self.columns, self.prompts, self.packing = inner.columns, inner.prompts, None

    def length(self, example: Example) -> int:
        """See `Scorer.length`."""
        return self._inner.length(example)

    def encode(self, examples: Sequence[Example]) -> Any:
        """The questions and their neutral prompts, on the CPU.

        Raises:
            ConfigError: the task has no neutral prompt.
        """
        return Pair(self._inner.encode(examples), self._inner.encode([_neutral(example) for example in examples]))

    def scores(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Scorer.scores`."""
        asked, neutral = self._inner.scores(model, batch.first), self._inner.scores(model, batch.second)
        return (asked - neutral).masked_fill(asked.isinf(), -torch.inf)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the calibrated scores."""
        return cross_entropy(self.scores(model, batch), batch.first.labels)

    def grade(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Scorer.grade`."""
        scores = self.scores(model, batch)
        right, losses = is_right(scores, batch.first), cross_entropy(scores, batch.first.labels)
        return torch.stack((right, losses.double()), dim=1).cpu()

    def preview(self, example: Example) -> str:
        """See `Scorer.preview`."""
        return f"{self._inner.preview(example)}\ncalibrated by the prompt {_neutral(example).prompt!r}"

    def settle(
        self,
        module: nn.Module,
        call: Call,
        examples: Sequence[Example],
        device: torch.device,
        *,
        lockstep: bool = False,
    ) -> None:
        """See `Scorer.settle`."""
        self._inner.settle(module, call, examples, device, lockstep=lockstep)


def _neutral(example: Example) -> Example:
    if example.neutral is None:
        raise ConfigError(
            "this task has no prompt without content to calibrate by",
            where="task.calibrated",
            remedy="leave task.calibrated away",
        )
    return replace(example, before="", text="", after=example.neutral)
