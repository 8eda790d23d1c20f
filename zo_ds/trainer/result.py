"""What result.json says of a run, whatever its method."""

from __future__ import annotations

from typing import Any

from zo_ds.evaluation.evaluate import Evaluation
from zo_ds.trainer.environment import peak_rss_gib


def result_of(
    final: Evaluation,
    *,
    forwards: int,
    seconds: float,
    steps: int = 0,
    best_step: int = 0,
    starts: int = 1,
    stopped_early: bool = False,
) -> dict[str, Any]:
    """The entries that every method has.

    Args:
        final: score on the test set.
        forwards: passes of one micro-batch, or what they cost in those.
        seconds: wall time.
        steps: updates that were made.
        best_step: after which one the weights were scored.
        starts: how often the run was started.
        stopped_early: it ran out of patience.
    """
    return {
        "metric": final.metric,
        **{f"final_{name}": value for name, value in final.values.items()},
        "test_examples": final.examples,
        "steps": steps,
        "stopped_early": stopped_early,
        "best_step": best_step,
        "forwards": forwards,
        "wall_s": round(seconds, 3),
        "starts": starts,
        "peak_rss_gib": round(peak_rss_gib(), 3),
    }
