"""Where a loss is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_ds.ops.plan import Plan


@dataclass(frozen=True)
class Displacement:
    """Where the loss is evaluated: at theta + eps * u.

    Attributes:
        seed: step seed.
        direction: which u.
        eps: radius, signed.
    """

    seed: int
    direction: int
    eps: float


@dataclass(frozen=True)
class Shift:
    """Where theta would be after updates that have not been made.

    Attributes:
        plan: the updates.
    """

    plan: Plan


Place = Displacement | None
"""None stands for theta itself."""
Anywhere = Place | Shift
"""What the sequential evaluator can go to."""


def run_of_one_seed(places: Sequence[Place], start: int, size: int) -> tuple[Place, ...]:
    """At most ``size`` places from ``start`` on that share a step seed."""
    run: list[Place] = []
    seed: int | None = None
    for place in places[start : start + size]:
        if place is not None:
            if seed is not None and place.seed != seed:
                break
            seed = place.seed
        run.append(place)
    return tuple(run)
