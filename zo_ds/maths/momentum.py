"""Momentum over a window of past directions: more coefficients in a step, and no buffer as large as the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def with_momentum(own: Tensor, earlier: Sequence[Sequence[float]], momentum: float) -> list[float]:
    """Coefficients of ``sum_k (1 - beta) beta^k c_{t-k,i} u_{t-k,i}``, as they stand in the record of step t.

    Those of this step are fp32((1 - beta) c_{t,i}); those of k steps before are fp32(beta^k) times what the record of
    that step has for its own directions, so that the last records are all a resumed run needs.

    Args:
        own: fp32 [N], c_t.
        earlier: the same of the steps before, the newest first, as recorded: times (1 - beta); [] for a skipped step.
        momentum: beta, in [0, 1).

    Returns:
        fp32 values, N for this step and for each earlier one up to the last that was not skipped.
    """
    used = max((number for number, row in enumerate(earlier, 1) if row), default=0)
    rows = [own.to(torch.float64) * (1.0 - momentum)]
    weight = 1.0
    for row in earlier[:used]:
        weight *= momentum
        rows.append(torch.tensor(row, dtype=torch.float64) * weight if row else torch.zeros_like(rows[0]))
    found: list[float] = torch.cat(rows).to(torch.float32).tolist()
    return found
