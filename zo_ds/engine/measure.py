"""The losses of a step, put together from what all ranks computed: one exchange of 16 bytes a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_ds.errors import DataError, PeerError
from zo_ds.forward.displacement import Anywhere
from zo_ds.forward.evaluator import Batch, Evaluator
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.grid import Grid
from zo_ds.parallel.layout import Layout
from zo_ds.parallel.sums import add, exact_sums, from_words, mean, to_words

_UNEQUAL = -1


@dataclass(frozen=True)
class Measured:
    """The same on every rank.

    Attributes:
        means: fp64 [places], mean loss over all examples of the step; nan where one is not finite.
        units: micro-batches of the step.
        examples: of the step.
        bad_examples: examples whose loss is not finite at some place.
        clean: whether theta itself is among the places.
    """

    means: Tensor
    units: int
    examples: int
    bad_examples: int
    clean: bool


class Measurement:
    """Evaluates this rank's share and exchanges the sums.

    Args:
        evaluator: of this rank.
        channel: to all ranks.
        grid: who computes what.
        layout: who must run the same forwards.
        chunk: places that are always computed together.
    """

    def __init__(self, evaluator: Evaluator, channel: Channel, grid: Grid, layout: Layout, chunk: int) -> None:
        self.grid, self.layout = grid, layout
        self._evaluator, self._channel, self._chunk = evaluator, channel, chunk

    def run(
        self, units: Sequence[Batch], places: Sequence[Anywhere], where: str, spare: Batch | None = None
    ) -> Measured:
        """The losses of a step; collective.

        Args:
            units: this rank's micro-batches.
            places: all of the step.
            where: the step, for messages.
            spare: computed and thrown away where the shard group needs this rank's part in more forwards than it has
                micro-batches for; None: take one of `units`.

        Raises:
            DataError: no rank has a micro-batch, or this one has none to keep its shard group going with.
            PeerError: a rank is gone, or micro-batches differ in size or number.
        """
        mine = self.grid.places(len(places), self._chunk)
        sums, sizes, bad = self._own(units, places, mine, spare)
        size = min(sizes, default=0) if len(sizes) < 2 else _UNEQUAL
        width = max(len(share) for share in self._shares(len(places)))
        message = torch.tensor([len(units), size, bad] + [0] * 2 * width)
        message[3 : 3 + 2 * len(mine)] = to_words(sums)
        messages = self._channel.all_gather(message)
        return self._reduced(messages, len(places), None in places, f"{where}, {sorted(sizes)} examples here")

    def _own(
        self, units: Sequence[Batch], places: Sequence[Anywhere], mine: range, spare: Batch | None
    ) -> tuple[list[int | None], set[int], int]:
        """(sum of each place, numbers of examples that a unit has, examples that are not finite)."""
        # A rank without a place of its own takes another's, to say how many examples it has.
        rounds, shown = len(units), [places[k] for k in mine] or [places[-1]]
        if self.layout.lockstep:
            counts = torch.cat(self._channel.all_gather(torch.tensor([len(units)])))
            rounds = max(int(counts[rank]) for rank in self.layout.members)
            shares = self._shares(len(places))
            shown += [shown[-1]] * (max(len(shares[rank]) for rank in self.layout.members) - len(shown))
        if rounds > len(units) and spare is None and not units:
            raise DataError(
                "a rank of a shard group has no micro-batch",
                where="engine.step",
                why="its shards are needed in every forward of the group",
                remedy="give every rank a micro-batch, or one as spare=...",
            )
        sums: list[int | None] = [0] * len(mine)
        sizes, bad = set[int](), 0
        for number in range(rounds):
            if number >= len(units):
                self._evaluator.losses(units[0] if spare is None else spare, shown)
                continue
            losses = self._evaluator.losses(units[number], shown)[: len(mine)]
            sums = [add(pair) for pair in zip(sums, exact_sums(losses), strict=True)]
            sizes.add(losses.shape[1])
            bad += int((~losses.isfinite()).any(dim=0).sum())
        return sums, sizes, bad

    def _shares(self, total: int) -> list[range]:
        return [self.grid.of(rank).places(total, self._chunk) for rank in range(self.grid.world_size)]

    def _reduced(self, messages: Sequence[Tensor], total: int, clean: bool, where: str) -> Measured:
        heads = [[int(value) for value in message[:3]] for message in messages]
        rows = [heads[at : at + self.grid.data] for at in range(0, len(heads), self.grid.data)]
        counts = [sum(head[0] for head in row) for row in rows]
        sizes = {head[1] for head in heads if head[0]}
        if len(set(counts)) > 1 or len(sizes) > 1 or _UNEQUAL in sizes:
            raise PeerError(
                "units of work differ in size or number",
                where=f"rank {self.grid.rank}, {where}",
                why=f"(micro-batches, examples in each; {_UNEQUAL} if they differ) by rank: {[h[:2] for h in heads]}",
                remedy="give all micro-batches the same number of examples (drop_last=True), and ranks of the same "
                "engine.grid.data_rank the same micro-batches",
            )
        if not sizes:
            raise DataError("a step needs at least one micro-batch", where="engine.step(batch)")
        parts: list[list[int | None]] = [[] for _ in range(total)]
        for message, share in zip(messages, self._shares(total), strict=True):
            for place, value in zip(share, from_words(message[3 : 3 + 2 * len(share)]), strict=True):
                parts[place].append(value)
        examples = counts[0] * sizes.pop()
        means = torch.tensor([mean(add(part), examples) for part in parts], dtype=torch.float64)
        bad = sum(max(row[d][2] for row in rows) for d in range(self.grid.data))
        return Measured(means, counts[0], examples, bad, clean)
