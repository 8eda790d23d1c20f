"""Skipped steps: a few are nothing, many in a row end the run with what is wrong and what helps."""

from __future__ import annotations

from collections.abc import Sequence

from zo_ds.engine.measure import Measured
from zo_ds.errors import NonFiniteError
from zo_ds.maths.estimators import SkipReason

_REMEDIES = {
    SkipReason.NON_FINITE: "lower eps, use float32 or bfloat16 instead of float16, look at the examples of these steps",
    SkipReason.ZERO_SPREAD: "raise eps, use more examples a step, or an objective that moves (accuracy often does not)",
    SkipReason.COEFFICIENT_CAP: "lower lr, or raise coefficient_cap if such a step is wanted",
}


class SkipWatch:
    """Counts skipped steps in a row.

    Args:
        limit: so many end the run.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reasons: list[SkipReason] = []

    def went_on(self, reasons: Sequence[SkipReason]) -> None:
        """Take over the skips of an earlier life; at least one more step is tried, however many there were."""
        self._reasons = list(reasons)[max(0, len(reasons) - self._limit + 1) :]

    def note(self, reason: SkipReason | None, measured: Measured, step: int) -> None:
        """Take note of a step.

        Args:
            reason: why it was skipped, None if it was not.
            measured: its losses.
            step: its number.

        Raises:
            NonFiniteError: there were too many.
        """
        self._reasons = [*self._reasons, reason] if reason is not None else []
        if len(self._reasons) < self._limit:
            return
        raise NonFiniteError(
            f"the last {len(self._reasons)} steps were all skipped",
            where=f"step {step}",
            why=f"{self._reasons[-1].value}: {_diagnosis(measured)}",
            remedy=_REMEDIES[self._reasons[-1]],
        )


def _diagnosis(measured: Measured) -> str:
    means = measured.means
    bad, count = int((~means.isfinite()).sum()), means.numel()
    if not bad:
        return f"losses between {float(means.min()):.6g} and {float(means.max()):.6g}"
    everything = f"every evaluation{', the unperturbed one too' if measured.clean else ''}"
    which = everything if bad == count else f"{bad} of {count} evaluations"
    return f"non-finite in {which}, for {measured.bad_examples} of {measured.examples} examples"
