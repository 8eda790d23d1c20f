"""What a step needs of those before it: their coefficients for momentum, the last spread for fzoo_r."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zo_ds.config.schema import ZerothOrderConfig
from zo_ds.journal.records import StepRecord
from zo_ds.maths.estimators import Estimator
from zo_ds.maths.momentum import with_momentum
from zo_ds.maths.schedules import Schedule


@dataclass(frozen=True)
class Earlier:
    """A step as later ones see it.

    Attributes:
        coefficients: of its own directions, as recorded; none if it was skipped.
        spread: of its own losses; None if it was skipped.
    """

    coefficients: tuple[float, ...]
    spread: float | None


class Past:
    """The last steps, as many as a step looks back on.

    Args:
        config: estimator and momentum.
    """

    def __init__(self, config: ZerothOrderConfig) -> None:
        self._count, self._momentum, self._window = config.num_directions, config.momentum, config.window
        self._reuses = config.estimator is Estimator.FZOO_R
        self._steps = deque[Earlier](maxlen=reach(config))

    def restore(self, steps: Sequence[Earlier]) -> None:
        """Look back on these, the newest last, and no others."""
        self._steps.clear()
        self._steps.extend(steps)

    def note(self, record: StepRecord) -> None:
        """A step was taken, or skipped."""
        self._steps.append(earlier(record, self._count))

    def coefficients(self, own: Tensor) -> list[float]:
        """What a step's record holds, from the fp32 [N] coefficients of its own directions."""
        newest_first = [step.coefficients for step in reversed(self._steps)]
        return with_momentum(own, newest_first[: self._window - 1], self._momentum)

    @property
    def spread(self) -> float | None:
        """Of the step before, if its losses are used again."""
        return self._steps[-1].spread if self._reuses and self._steps else None


def reach(config: ZerothOrderConfig) -> int:
    """How many steps a step looks back on."""
    return max(config.window - 1, 1 if config.estimator is Estimator.FZOO_R else 0)


def earlier(record: StepRecord, num_directions: int) -> Earlier:
    """What a record means to later steps."""
    own = tuple(term.coefficient for term in record.update.terms[:num_directions])
    return Earlier(own, None) if record.skip is not None else Earlier(own, record.spread)


def settings(config: ZerothOrderConfig) -> dict[str, Any] | None:
    """What the numbers of earlier steps depend on, for the journal: where it changes, steps do not look back further.

    The learning rate is not among them: a coefficient is in weight units, whatever it was made with.
    """
    found: dict[str, Any] = {"momentum": config.momentum} if config.momentum else {}
    if config.estimator is Estimator.FZOO_R:
        found |= {"eps": config.eps, "spread_std": config.spread_std.value}
        if config.eps_schedule is not Schedule.CONSTANT:
            schedule = config.eps_schedule.value
            found |= {"eps_schedule": schedule, "final_ratio": config.final_ratio, "total_steps": config.total_steps}
    return found or None
