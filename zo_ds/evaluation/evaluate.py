"""Accuracy and loss of the current weights, shared out over ranks, the same result on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.parallel.channel import Channel
from zo_ds.tasks.scoring import Batch, Scorer


@dataclass(frozen=True)
class Evaluation:
    """A model's score on some examples.

    Attributes:
        accuracy: share of examples whose best class is right, 0..1.
        loss: mean cross-entropy.
        examples: how many.
    """

    accuracy: float
    loss: float
    examples: int

    def better_than(self, other: Evaluation | None, by: str) -> bool:
        """Whether this is the better score by ``"loss"`` or by ``"accuracy"``; the other one decides between equals."""
        if other is None:
            return True
        mine, theirs = (-self.loss, self.accuracy), (-other.loss, other.accuracy)
        return mine > theirs if by == "loss" else mine[::-1] > theirs[::-1]


def evaluate(
    score: Callable[[Callable[[nn.Module, Batch], Tensor], Batch], Tensor],
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int,
    channel: Channel,
    device: torch.device | None = None,
    *,
    lockstep: bool = False,
) -> Evaluation:
    """Score examples at the current weights.

    Sorted by length into batches, so that little is spent on padding; batch number b is scored by rank b mod ranks.

    Args:
        score: runs a function of (model, batch) without gradients, e.g. `ZOEngine.call`.
        scorer: gives class scores.
        examples: one or more.
        batch_size: examples in one forward pass.
        channel: to the other ranks.
        device: where the model runs, the CPU if None.
        lockstep: every rank must run as many forwards as any other; what is too much is computed and thrown away.
    """
    order = sorted(range(len(examples)), key=lambda index: (scorer.length(examples[index]), index))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found = torch.zeros(len(examples), 2, dtype=torch.float64)
    rounds = -(-len(batches) // channel.world_size) * channel.world_size
    for number in range(channel.rank, rounds if lockstep else len(batches), channel.world_size):
        rows = batches[min(number, len(batches) - 1)]
        batch = scorer.encode([examples[index] for index in rows]).to(device or torch.device("cpu"))
        graded = score(lambda model, inputs: _graded(scorer, model, inputs), batch)
        if number < len(batches):
            found[rows] = graded
    # Every row is written by one rank and zero on the others.
    total = torch.stack(channel.all_gather(found)).sum(0)
    right, loss = (float(value) for value in total.mean(0))
    return Evaluation(right, loss, len(examples))


def _graded(scorer: Scorer, model: nn.Module, batch: Batch) -> Tensor:
    scores = scorer.scores(model, batch)
    right = scores.argmax(-1) == batch.labels
    loss = nn.functional.cross_entropy(scores, batch.labels, reduction="none")
    return torch.stack((right.double(), loss.double()), dim=1).cpu()
