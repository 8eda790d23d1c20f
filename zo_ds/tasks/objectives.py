"""From the scores of options to what a step lowers. A forward-only step needs no derivative of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zo_ds.tasks.task import Objective

ScoreLoss = Callable[[Tensor, Tensor], Tensor]
"""(scores [n, options], labels [n]) -> fp32 [n]."""


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the right option, with a softmax over the options."""
    return nn.functional.cross_entropy(scores, labels, reduction="none")


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Score of the best wrong option less that of the right one: negative where the answer is right."""
    right = scores.gather(-1, labels.unsqueeze(-1))
    wrong = scores.scatter(-1, labels.unsqueeze(-1), -torch.inf).amax(-1)
    return wrong - right.squeeze(-1)


def error(scores: Tensor, labels: Tensor) -> Tensor:
    """1 where another option than the right one is best, else 0. Ties go to the first option, as in evaluation."""
    return (scores.argmax(-1) != labels).float()


def negative_mean(scores: Tensor, labels: Tensor) -> Tensor:
    """The negative score of an only option: its mean negative log-likelihood."""
    return -scores[:, 0]


SCORE_LOSSES: dict[Objective, ScoreLoss] = {
    Objective.CROSS_ENTROPY: cross_entropy,
    Objective.MARGIN: margin,
    Objective.ACCURACY: error,
}
