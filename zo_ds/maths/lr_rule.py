"""A learning rate for a run that was given none, and what a range test makes of its measurements.

A normalised step of N directions moves theta by lr along the unit gradient, and at random by lr sqrt(d / N). On a
quadratic the loss changes by -lr |g| + lr^2 tr(H) / (2 N), so the best single step is N |g| / tr(H). Of d trained
elements, |g| grows as sqrt(d) and tr(H) as d: the best step is proportional to N / sqrt(d). Over T steps the noise of
the steps adds up, and the best constant rate falls as 1 / sqrt(T). (Radius and noise structure do not enter: signs and
normals have the same second moments, and eps cancels in every estimator.) What is left is one constant, see docs.
"""

from __future__ import annotations

import math

from zo_ds.maths.estimators import Estimator, EstimatorSpec

SINGLE_STEP = 20.0
"""lr sqrt(d) / N of a good single step, in weight units; docs/learning_rate.md has where it comes from."""
OVER_STEPS = 1.6
"""What a run of T steps takes of its best single step, times 1 / sqrt(T)."""
GRADIENT = 10.0
"""Norm of a language model's gradient in all weights: what estimators that do not normalise are divided by."""
UNKNOWN_STEPS = 1000
"""What a run that does not say its length is taken to have."""
_NORMALISED = (Estimator.FZOO, Estimator.FZOO_R, Estimator.ZO_SGD_SIGN)


def default_lr(spec: EstimatorSpec, trained: int, total: int, steps: int) -> float:
    """The learning rate of a run that was given none.

    Args:
        spec: estimator and N.
        trained: elements that are trained.
        total: elements of the model.
        steps: of the run.
    """
    lr = SINGLE_STEP * spec.num_directions / math.sqrt(trained * max(1, steps))
    if spec.estimator in _NORMALISED:
        return lr
    return lr / (GRADIENT * math.sqrt(trained / total))


def single_step_move(num_directions: int, trained: int) -> float:
    """Root mean square move of an element in a good single step, in weight units: lr / sqrt(N) of a normalised one."""
    return SINGLE_STEP * math.sqrt(num_directions) / math.sqrt(trained)


def lr_of_run(best_single: float, steps: int) -> float:
    """The learning rate of a run whose best single step was measured."""
    return best_single * min(1.0, OVER_STEPS / math.sqrt(max(1, steps)))
