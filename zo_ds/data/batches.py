"""Which examples a step sees: a pure function of (seed, step), the same on every rank and after every restart."""

from __future__ import annotations

from collections.abc import Sequence

from zo_ds.data.shuffle import salted, shuffled
from zo_ds.errors import ConfigError

POOL = 16
"""Batches that are drawn together when they are grouped by length."""


class BatchSampler:
    """Draws batches epoch by epoch from a shuffled order, one order for each class if balanced.

    Args:
        labels: of the training examples.
        batch_size: examples a step.
        seed: of the order.
        balanced: give every class the same share of each batch, in turn, so that micro-batches are balanced too.
        lengths: of the examples, to group by: `POOL` batches are drawn at once, dealt out by length, and shuffled.
            None: no grouping.

    Raises:
        ConfigError: a balanced batch cannot be divided by the number of classes.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        balanced: bool,
        lengths: Sequence[int] | None = None,
    ) -> None:
        classes: list[int | None] = [*sorted(set(labels))] if balanced else [None]
        if batch_size % len(classes):
            raise ConfigError(
                f"a batch of {batch_size} cannot hold as many examples of each of {len(classes)} classes",
                where="training.batch_size",
                remedy=f"use a multiple of {len(classes)}, or data.balanced=false",
            )
        self._pools = [[i for i, y in enumerate(labels) if c is None or y == c] for c in classes]
        self._share = batch_size // len(classes)
        self._seed = seed
        self._lengths = lengths
        self._orders: dict[tuple[int, int], list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """Indices of a step's examples, `batch_size` of them."""
        drawn = [self._of_class(pool, step) for pool in range(len(self._pools))]
        return [index for turn in zip(*drawn, strict=True) for index in turn]

    def _of_class(self, pool: int, step: int) -> list[int]:
        if self._lengths is None:
            return [self._draw(pool, step * self._share + k) for k in range(self._share)]
        block, place = divmod(step, POOL)
        first = block * POOL * self._share
        together = [self._draw(pool, first + k) for k in range(POOL * self._share)]
        together.sort(key=self._lengths.__getitem__)
        # The same for every class: short examples of one meet short examples of the others.
        turn = self._shuffled(range(POOL), len(self._pools), block)[place]
        return together[turn * self._share : (turn + 1) * self._share]

    def _draw(self, pool: int, position: int) -> int:
        epoch, place = divmod(position, len(self._pools[pool]))
        if (pool, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[1] >= epoch - 1}
            self._orders[pool, epoch] = self._shuffled(self._pools[pool], pool, epoch)
        return self._orders[pool, epoch][place]

    def _shuffled(self, items: Sequence[int], stream: int, number: int) -> list[int]:
        return shuffled(items, salted(self._seed, stream, number))
