"""What the current weights score on some examples, shared out over ranks, the same result on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.evaluation.shared import over_ranks
from zo_ds.parallel.channel import Channel
from zo_ds.tasks.scorer import Scorer

LOSS = "loss"


@dataclass(frozen=True)
class Evaluation:
    """A model's score on some examples.

    Attributes:
        metric: name of the value that counts: accuracy, f1, reward (more is better) or loss (less is).
        values: means over the examples by name; the loss is always there.
        examples: how many.
    """

    metric: str
    values: Mapping[str, float]
    examples: int

    @property
    def score(self) -> float:
        """The value that counts."""
        return self.values[self.metric]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.values[LOSS]

    def better_than(self, other: Evaluation | None, by: str) -> bool:
        """Whether this is the better one by ``"loss"`` or by ``"metric"``; the other one decides between equals."""
        if other is None:
            return True
        mine, theirs = self._rank(), other._rank()
        return mine > theirs if by == LOSS else mine[::-1] > theirs[::-1]

    def _rank(self) -> tuple[float, float]:
        loss, score = (-math.inf if math.isnan(value) else value for value in (-self.loss, self.score))
        return loss, loss if self.metric == LOSS else score

    def __str__(self) -> str:
        """For a log line."""
        named = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.values.items())
        return f"{named} ({self.examples} examples)"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def evaluate(
    call: Callable[[Callable[[nn.Module, Any], Tensor], Any], Tensor],
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int,
    channel: Channel,
    device: torch.device | None = None,
    *,
    lockstep: bool = False,
) -> Evaluation:
    """Score examples at the current weights, see `over_ranks`.

    Args:
        call: runs a function of (model, batch) without gradients, e.g. `ZOEngine.call`.
        scorer: encodes and grades.
        examples: one or more.
        batch_size: examples in one forward pass.
        channel: to the other ranks.
        device: where the model runs, the CPU if None.
        lockstep: every rank must run as many forwards as any other.
    """

    def grade(batch: list[Example]) -> Tensor:
        return call(scorer.grade, scorer.encode(batch).to(device or torch.device("cpu")))

    total = over_ranks(grade, examples, scorer.length, batch_size, channel, lockstep=lockstep)
    means = (float(value) for value in total.mean(0))
    return Evaluation(scorer.columns[0], dict(zip(scorer.columns, means, strict=True)), len(examples))
