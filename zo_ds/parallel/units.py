"""Who computes which unit of work, and the fixed order in which losses are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def units_of_rank(num_units: int, rank: int, world_size: int) -> range:
    """Numbers of the units a rank computes: unit u belongs to rank u mod world_size."""
    return range(rank, num_units, world_size)


def interleave(gathered: Sequence[Tensor]) -> Tensor:
    """Put the ranks' units back into their global order.

    Args:
        gathered: one tensor [units of the rank, ...] for each rank, in rank order.

    Returns:
        Tensor [all units, ...]; the u-th comes from rank u mod world_size.
    """
    return torch.stack(list(gathered), dim=1).flatten(0, 1)


def ordered_mean(losses: Tensor) -> Tensor:
    """Mean over examples, added up in their order in fp64, so that no reduction tree can change a bit.

    Args:
        losses: fp64 [units, probes, examples of a unit].

    Returns:
        fp64 [probes].
    """
    by_example = losses.transpose(1, 2).flatten(0, 1)
    total = torch.zeros(losses.shape[1], dtype=torch.float64)
    for row in by_example:
        total += row
    return total / by_example.shape[0]
