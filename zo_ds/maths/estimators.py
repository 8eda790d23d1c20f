"""Estimators: from the losses of a step to the coefficients of its update. Pure functions; no engine, no state.

====== ============== ===================================================== =========
name   forwards       coefficient c_i of ``theta <- theta - sum_i c_i u_i``  lr is in
====== ============== ===================================================== =========
fzoo   N + 1          lr (l_i - l_0) / (N max(spread, floor))                weight units per normalised step
mezo   2 N            lr (l_i+ - l_i-) / (2 eps N)                           weight^2 per loss
zo_sgd N + 1          lr (l_i - l_0) / (eps N)                               weight^2 per loss
====== ============== ===================================================== =========

FZOO: arXiv 2506.09034, Algorithm 1; spread is the standard deviation of the N perturbed losses. For sign vectors its
mean square is eps^2 |grad|^2, so the step has length lr along the unit gradient whatever eps is.
MeZO: arXiv 2305.17333, Algorithm 1, with N directions. zo_sgd: the one-sided estimator without normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

_ROUNDING = 1e-13
"""A spread below this fraction of the losses is what adding them up in fp64 leaves of a tie."""


class Estimator(str, Enum):
    """Published names."""

    FZOO = "fzoo"
    MEZO = "mezo"
    ZO_SGD = "zo_sgd"


class SpreadStd(str, Enum):
    """Divisor of the variance: ``sample`` N - 1 (the paper's formula), ``population`` N (the paper's released code)."""

    SAMPLE = "sample"
    POPULATION = "population"


class SkipReason(str, Enum):
    """Why a step left the weights alone."""

    NON_FINITE = "non_finite_loss"
    ZERO_SPREAD = "zero_spread"
    COEFFICIENT_CAP = "coefficient_cap"


@dataclass(frozen=True)
class EstimatorSpec:
    """An estimator and its constants.

    Attributes:
        estimator: by published name.
        num_directions: N. fzoo needs 4 or more: E[1/spread^2] is infinite for N <= 3.
        spread_std: divisor of the variance (fzoo).
        spread_floor: the least spread that a step is divided by (fzoo), in loss units.
        coefficient_cap: a step with a larger |c_i| is skipped, in weight units.

    Raises:
        ValueError: a constant with which no step could be right.
    """

    estimator: Estimator = Estimator.FZOO
    num_directions: int = 8
    spread_std: SpreadStd = SpreadStd.SAMPLE
    spread_floor: float = 1e-8
    coefficient_cap: float = 1.0

    def __post_init__(self) -> None:
        """Refuse constants with which no step could be right."""
        least = 4 if self.estimator is Estimator.FZOO else 1
        if self.num_directions < least:
            raise ValueError(f"{self.estimator.value} needs {least} or more directions, got {self.num_directions}")
        if not (self.spread_floor > 0 and self.coefficient_cap > 0):
            raise ValueError("spread_floor and coefficient_cap are positive")


@dataclass(frozen=True)
class Probe:
    """One evaluation of the loss: at theta + side * eps * u_direction; side 0 is theta itself (direction is then 0)."""

    direction: int
    side: int


@dataclass(frozen=True)
class Verdict:
    """What the losses of a step amount to.

    Attributes:
        coefficients: fp32 [N], zeros if the step is skipped.
        clean_loss: l_0, or the mean of all losses for an estimator that does not evaluate theta itself.
        spread: standard deviation of the perturbed losses.
        skip: None, or why the weights must stay as they are.
    """

    coefficients: Tensor
    clean_loss: float
    spread: float
    skip: SkipReason | None


def probes(spec: EstimatorSpec) -> tuple[Probe, ...]:
    """The evaluations a step needs, in the order of the losses that `verdict` takes."""
    directions = range(spec.num_directions)
    up = tuple(Probe(i, 1) for i in directions)
    if spec.estimator is Estimator.MEZO:
        return up + tuple(Probe(i, -1) for i in directions)
    return (Probe(0, 0), *up)


def verdict(losses: Tensor, spec: EstimatorSpec, lr: float, eps: float) -> Verdict:
    """Turn losses into coefficients, or into a reason to skip the step.

    Args:
        losses: fp64 [number of probes], ordered as `probes(spec)`.
        spec: the estimator.
        lr: learning rate of this step.
        eps: radius of this step, in weight units.

    Raises:
        ValueError: the number of losses does not fit the estimator.
    """
    if losses.shape != (len(probes(spec)),):
        raise ValueError(f"{spec.estimator.value} needs {len(probes(spec))} losses, got shape {tuple(losses.shape)}")
    losses = losses.to(torch.float64)
    two_sided = spec.estimator is Estimator.MEZO
    perturbed = losses if two_sided else losses[1:]
    clean_loss = float(losses.mean()) if two_sided else float(losses[0])
    spread = _std(perturbed, spec.spread_std)
    raw = _FORMULAS[spec.estimator](losses, spec, lr, eps, spread)
    coefficients = raw.to(torch.float32)
    skip = _skip_reason(losses, coefficients, spread, spec)
    if skip is not None:
        coefficients = torch.zeros_like(coefficients)
    return Verdict(coefficients, clean_loss, spread, skip)


def _std(losses: Tensor, convention: SpreadStd) -> float:
    correction = 1 if convention is SpreadStd.SAMPLE and losses.numel() > 1 else 0
    # Relative to one of them, ties are exact zeros; a rounded mean would turn them into a tiny spread.
    return float((losses - losses[0]).std(correction=correction))


def _skip_reason(losses: Tensor, coefficients: Tensor, spread: float, spec: EstimatorSpec) -> SkipReason | None:
    if not bool(losses.isfinite().all()) or not math.isfinite(spread):
        return SkipReason.NON_FINITE
    if spec.estimator is Estimator.FZOO and spread <= _ROUNDING * float(losses.abs().max()):
        return SkipReason.ZERO_SPREAD
    if not bool((coefficients.abs() <= spec.coefficient_cap).all()):
        return SkipReason.COEFFICIENT_CAP
    return None


def _fzoo(losses: Tensor, spec: EstimatorSpec, lr: float, eps: float, spread: float) -> Tensor:
    return (losses[1:] - losses[0]) * (lr / (spec.num_directions * max(spread, spec.spread_floor)))


def _mezo(losses: Tensor, spec: EstimatorSpec, lr: float, eps: float, spread: float) -> Tensor:
    up, down = losses[: spec.num_directions], losses[spec.num_directions :]
    return (up - down) * (lr / (2.0 * eps * spec.num_directions))


def _zo_sgd(losses: Tensor, spec: EstimatorSpec, lr: float, eps: float, spread: float) -> Tensor:
    return (losses[1:] - losses[0]) * (lr / (eps * spec.num_directions))


_FORMULAS: dict[Estimator, Callable[[Tensor, EstimatorSpec, float, float, float], Tensor]] = {
    Estimator.FZOO: _fzoo,
    Estimator.MEZO: _mezo,
    Estimator.ZO_SGD: _zo_sgd,
}
