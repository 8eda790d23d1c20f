"""Learning-rate and radius schedules: pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from enum import Enum


class Schedule(str, Enum):
    """Shape of a schedule after warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


def scheduled(
    peak: float, schedule: Schedule, step: int, total_steps: int, *, warmup_steps: int = 0, final_ratio: float = 0.0
) -> float:
    """Value at a step.

    Args:
        peak: value reached at the end of warm-up.
        schedule: shape after warm-up.
        step: 0-based.
        total_steps: length of the run; the decay ends on its last step.
        warmup_steps: steps of linear rise, 0 or more; step 0 already takes ``peak / (warmup_steps + 1)``, since a zero
            learning rate would waste the forwards.
        final_ratio: value on the last step as a fraction of peak, if there are steps after warm-up to get there (not
            used by ``constant``).

    Raises:
        ValueError: a count is negative, or total_steps is zero.
    """
    if step < 0 or warmup_steps < 0 or total_steps <= 0:
        raise ValueError(f"step {step} of {total_steps} with {warmup_steps} of warm-up: counts are not negative")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule is Schedule.CONSTANT:
        return peak
    span = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    remaining = 1.0 - progress if schedule is Schedule.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1.0 - final_ratio) * remaining)
