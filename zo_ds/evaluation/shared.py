"""Examples computed in batches that ranks share out; every rank gets all of what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_ds.data.examples import Example
from zo_ds.parallel.channel import Channel


def over_ranks(
    compute: Callable[[list[Example]], Tensor],
    examples: Sequence[Example],
    length: Callable[[Example], int],
    batch_size: int,
    channel: Channel,
    *,
    lockstep: bool = False,
) -> Tensor:
    """Rows of numbers, one for each example, in the order of the examples; the same on every rank.

    Sorted by length into batches, so that little is spent on padding; batch number b is computed by rank b mod ranks.

    Args:
        compute: gives [batch, columns] on the CPU.
        examples: one or more.
        length: of an example.
        batch_size: examples in one call of `compute`.
        channel: to the other ranks.
        lockstep: every rank must compute as many batches as any other; what is too much is thrown away.
    """
    order = sorted(range(len(examples)), key=lambda index: (length(examples[index]), index))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // channel.world_size) * channel.world_size
    mine: dict[int, Tensor] = {}
    for number in range(channel.rank, rounds if lockstep else len(batches), channel.world_size):
        rows = compute([examples[index] for index in batches[min(number, len(batches) - 1)]])
        if number < len(batches):
            mine[number] = rows
    # Rank 0 has the first batch; a rank without one does not know what the others found.
    kind = next(iter(mine.values()), torch.empty(0, 0, dtype=torch.float64))
    shapes = channel.all_gather(torch.tensor([kind.shape[1], kind.dtype.itemsize]))
    columns, size = shapes[0].tolist()
    found = torch.zeros(len(examples), columns, dtype=torch.float64 if size == 8 else torch.float32)
    for number, rows in mine.items():
        found[batches[number]] = rows
    # Every row is written by one rank and zero on the others.
    return torch.stack(channel.all_gather(found)).sum(0)
