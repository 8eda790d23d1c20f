"""Estimators: from the losses of a step to the coefficients of its update. Pure functions; no engine, no state.

=========== ======== ================================================= ================================
name        forwards c_i of ``theta <- theta - sum_i c_i u_i``         lr is in
=========== ======== ================================================= ================================
fzoo        N + 1    lr (l_i - l_0) / (N max(spread, floor))           weight units per normalised step
fzoo_r      N + 1    the same, with the spread of two steps together   weight units per normalised step
mezo        2 N      lr (l_i+ - l_i-) / (2 eps N)                      weight^2 per loss
zo_sgd      N + 1    lr (l_i - l_0) / (eps N)                          weight^2 per loss
zo_sgd_sign 2 N      lr sign(l_i+ - l_i-) / N                          weight units
zo_sgd_cons 2 + 3    best of 0, c, -c where c = lr (l+ - l-) / (2 eps) weight^2 per loss
=========== ======== ================================================= ================================

FZOO: arXiv 2506.09034, Algorithm 1; spread is the standard deviation of the N perturbed losses. For sign vectors its
mean square is eps^2 |grad|^2, so the step has length lr along the unit gradient whatever eps is.
MeZO: arXiv 2305.17333, Algorithm 1, with N directions. zo_sgd: the one-sided estimator without normalisation.
docs/estimators.md has the others, their sources, and the baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

_ROUNDING = 1e-13
"""A spread below this fraction of the losses is what adding them up in fp64 leaves of a tie."""


class Estimator(str, Enum):
    """Published names."""

    FZOO = "fzoo"
    FZOO_R = "fzoo_r"
    MEZO = "mezo"
    ZO_SGD = "zo_sgd"
    ZO_SGD_SIGN = "zo_sgd_sign"
    ZO_SGD_CONS = "zo_sgd_cons"


class Baseline(str, Enum):
    """What perturbed losses are compared with: ``clean`` the loss at theta, ``mean`` the mean of the other ones."""

    CLEAN = "clean"
    MEAN = "mean"


class SpreadStd(str, Enum):
    """Divisor of the variance: ``sample`` N - 1 (the paper's formula), ``population`` N (the paper's released code)."""

    SAMPLE = "sample"
    POPULATION = "population"


class SkipReason(str, Enum):
    """Why a step left the weights alone."""

    NON_FINITE = "non_finite_loss"
    ZERO_SPREAD = "zero_spread"
    COEFFICIENT_CAP = "coefficient_cap"


_NORMALISED = (Estimator.FZOO, Estimator.FZOO_R)
_ONE_SIDED = (*_NORMALISED, Estimator.ZO_SGD)
_TRIED = 3
"""Places that zo_sgd_cons chooses among."""


@dataclass(frozen=True)
class EstimatorSpec:
    """An estimator and its constants.

    Attributes:
        estimator: by published name.
        num_directions: N. fzoo needs 4 or more: E[1/spread^2] is infinite for N <= 3. fzoo_r needs 3 (its spread is
            that of 2 N losses), zo_sgd_cons has 1.
        spread_std: divisor of the variance (fzoo, fzoo_r).
        spread_floor: the least spread that a step is divided by (fzoo, fzoo_r), in loss units.
        coefficient_cap: a step with a larger |c_i| is skipped, in weight units.
        baseline: what perturbed losses are compared with (fzoo, fzoo_r, zo_sgd).

    Raises:
        ValueError: a constant with which no step could be right.
    """

    estimator: Estimator = Estimator.FZOO
    num_directions: int = 8
    spread_std: SpreadStd = SpreadStd.SAMPLE
    spread_floor: float = 1e-8
    coefficient_cap: float = 1.0
    baseline: Baseline = Baseline.CLEAN

    def __post_init__(self) -> None:
        """Refuse constants with which no step could be right."""
        if not (self.spread_floor > 0 and self.coefficient_cap > 0):
            raise ValueError("spread_floor and coefficient_cap are positive")
        if self.baseline is Baseline.MEAN and self.estimator not in _ONE_SIDED:
            raise ValueError(
                f"baseline is mean: {self.estimator.value} compares two sides with each other and has no baseline; "
                f"use baseline: clean, or one of {', '.join(e.value for e in _ONE_SIDED)}"
            )
        self._check_directions()

    def _check_directions(self) -> None:
        count, name = self.num_directions, self.estimator.value
        if count < 1:
            raise ValueError(f"num_directions is {count}: {name} needs 1 or more")
        if self.estimator is Estimator.FZOO and count < 4:
            raise ValueError(
                f"num_directions is {count}: fzoo divides by the spread of N losses, and with N < 4 the expected step "
                "is infinite; use 4 or more (8 is the default), or estimator: mezo"
            )
        if self.estimator is Estimator.FZOO_R and count < 3:
            raise ValueError(
                f"num_directions is {count}: fzoo_r divides by the spread of the N losses of this step and the N of "
                "the step before; use 3 or more, or estimator: mezo"
            )
        if self.estimator is Estimator.ZO_SGD_CONS and count != 1:
            raise ValueError(
                f"num_directions is {count}: zo_sgd_cons tries one step forward and back along one direction; "
                "set num_directions: 1"
            )
        if self.baseline is Baseline.MEAN and count < 2:
            raise ValueError(
                f"num_directions is {count}: baseline mean compares each loss with the others; use 2 or more"
            )

    @property
    def evaluates_theta(self) -> bool:
        """Whether the loss at theta itself is among those that `verdict` takes."""
        return self.estimator in _ONE_SIDED and self.baseline is Baseline.CLEAN


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
        spread: standard deviation of the perturbed losses of this step alone.
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
    if spec.estimator not in _ONE_SIDED:
        return up + tuple(Probe(i, -1) for i in directions)
    return (Probe(0, 0), *up) if spec.evaluates_theta else up


def forwards(spec: EstimatorSpec) -> int:
    """Evaluations of a step that is not skipped, those of `follow_up` included."""
    return len(probes(spec)) + (_TRIED if spec.estimator is Estimator.ZO_SGD_CONS else 0)


def verdict(losses: Tensor, spec: EstimatorSpec, lr: float, eps: float, previous: float | None = None) -> Verdict:
    """Turn losses into coefficients, or into a reason to skip the step.

    Args:
        losses: fp64 [number of probes], ordered as `probes(spec)`.
        spec: the estimator.
        lr: learning rate of this step.
        eps: radius of this step, in weight units.
        previous: spread of the step before, as it would be at this step's radius; None if there was no such step or it
            was skipped (fzoo_r; the others do not look at it).

    Raises:
        ValueError: the number of losses does not fit the estimator.
    """
    if losses.shape != (len(probes(spec)),):
        raise ValueError(f"{spec.estimator.value} needs {len(probes(spec))} losses, got shape {tuple(losses.shape)}")
    losses = losses.to(torch.float64)
    clean_loss = float(losses[0]) if spec.evaluates_theta else float(losses.mean())
    spread = _std(losses[1:] if spec.evaluates_theta else losses, spec.spread_std)
    coefficients = _formula(losses, spec, lr, eps, spread, previous).to(torch.float32)
    skip = _skip_reason(losses, coefficients, spread, spec)
    if skip is not None:
        coefficients = torch.zeros_like(coefficients)
    return Verdict(coefficients, clean_loss, spread, skip)


def follow_up(spec: EstimatorSpec, found: Verdict) -> tuple[float, ...]:
    """Coefficients to try on the same batch before one is taken, 0 first: theta as it is. Empty: `found` stands."""
    if spec.estimator is not Estimator.ZO_SGD_CONS or found.skip is not None:
        return ()
    coefficient = float(found.coefficients[0])
    return 0.0, coefficient, -coefficient


def settle(found: Verdict, tried: tuple[float, ...], losses: Tensor) -> Verdict:
    """Take the coefficient with the least loss; among equals the first, so that theta stays.

    Args:
        found: the verdict before.
        tried: as `follow_up` gave them.
        losses: fp64 [tried], at theta - coefficient * u.
    """
    values = [float(loss) for loss in losses]
    if all(map(math.isfinite, values)):
        best, skip = tried[values.index(min(values))], None
    else:
        best, skip = 0.0, SkipReason.NON_FINITE
    return replace(found, coefficients=torch.tensor([best], dtype=torch.float32), clean_loss=values[0], skip=skip)


def _std(losses: Tensor, convention: SpreadStd) -> float:
    correction = 1 if convention is SpreadStd.SAMPLE and losses.numel() > 1 else 0
    # Relative to one of them, ties are exact zeros; a rounded mean would turn them into a tiny spread.
    return float((losses - losses[0]).std(correction=correction))


def _skip_reason(losses: Tensor, coefficients: Tensor, spread: float, spec: EstimatorSpec) -> SkipReason | None:
    if not bool(losses.isfinite().all()) or not math.isfinite(spread):
        return SkipReason.NON_FINITE
    if spec.estimator in _NORMALISED and spread <= _ROUNDING * float(losses.abs().max()):
        return SkipReason.ZERO_SPREAD
    if not bool((coefficients.abs() <= spec.coefficient_cap).all()):
        return SkipReason.COEFFICIENT_CAP
    return None


def _formula(
    losses: Tensor, spec: EstimatorSpec, lr: float, eps: float, spread: float, previous: float | None
) -> Tensor:
    """fp64 [N], see the table above."""
    if spec.estimator in _NORMALISED:
        reused = previous if spec.estimator is Estimator.FZOO_R else None
        both = spread if reused is None else math.sqrt((spread * spread + reused * reused) / 2.0)
        return _one_sided(losses, spec, lr, max(both, spec.spread_floor))
    if spec.estimator is Estimator.ZO_SGD:
        return _one_sided(losses, spec, lr, eps)
    rises = losses[: spec.num_directions] - losses[spec.num_directions :]
    if spec.estimator is Estimator.ZO_SGD_SIGN:
        return rises.sign() * (lr / spec.num_directions)
    return rises * (lr / (2.0 * eps * spec.num_directions))


def _one_sided(losses: Tensor, spec: EstimatorSpec, lr: float, scale: float) -> Tensor:
    count = spec.num_directions
    if spec.baseline is Baseline.CLEAN:
        return (losses[1:] - losses[0]) * (lr / (count * scale))
    # l_i less the mean of the others is (l_i less the mean of all) * N / (N - 1).
    rises = losses - losses[0]
    return (rises - rises.mean()) * (lr / ((count - 1) * scale))
