"""Spot audits: a block of the weights computed anew from the newest snapshot and the journal, compared with memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zo_ds.errors import CorruptRunError
from zo_ds.journal.history import Stretch
from zo_ds.journal.replay import legs
from zo_ds.journal.snapshot import files_of, quarantine
from zo_ds.maths.directions import ParamInfo
from zo_ds.ops import api as ops
from zo_ds.stores.base import WeightStore
from zo_ds.stores.shards import places, read_checked

BLOCK_ELEMENTS = 2**18


class Auditor:
    """Goes through the weights block by block, one block an audit; a block that differs is put right.

    Args:
        store: whose weights are looked at.
        warn: told what was found.
    """

    def __init__(self, store: WeightStore, warn: Callable[[str], None]) -> None:
        self._store, self._warn = store, warn
        self._next = 0
        self.repaired = 0

    def audit(self, snapshot: Path, since: Sequence[Stretch]) -> None:
        """Look at the next block.

        Args:
            snapshot: the newest good one.
            since: what was applied since it was taken.
        """
        blocks = [
            (parameter, info, start, count)
            for parameter, info in self._store.parameters.items()
            for start, count in _blocks(*self._store.held(parameter))
        ]
        if not blocks:
            return
        parameter, info, start, count = blocks[self._next % len(blocks)]
        self._next += 1
        try:
            wanted = _saved_block(snapshot, info, start, count)
        except (OSError, CorruptRunError) as error:
            self._warn(f"the snapshot cannot be read any more and is set aside: {error} ({quarantine(snapshot)})")
            return
        with self._store.local_shard(parameter) as (first, flat):
            live = flat.narrow(0, start - first, wanted.numel())
            wanted = wanted.to(live.device)
            for leg in legs(since):
                ops.apply_([wanted], [info.site(leg.noise, start)], leg.plan)
            if bool((_bits(wanted) != _bits(live)).any()):
                at = int((_bits(wanted) != _bits(live)).nonzero()[0]) + start
                self._warn(
                    f"weights in memory were damaged: '{info.name}', element {at}, differs from snapshot and journal; "
                    "put right. The steps since it happened were measured on damaged weights: check the memory"
                )
                live.copy_(wanted)
                self.repaired += 1


def _blocks(first: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of the blocks of a stretch of elements."""
    last = first + count
    return [(at, min(BLOCK_ELEMENTS, last - at)) for at in range(first, last, BLOCK_ELEMENTS)]


def _saved_block(snapshot: Path, info: ParamInfo, start: int, count: int) -> Tensor:
    files = {file.name: file for file in files_of(snapshot)}
    place = places(snapshot, files)[info.name]
    width = place.count // max(1, info.numel)
    raw = read_checked(snapshot, files[place.file], place.start + start * width, count * width)
    return torch.frombuffer(bytearray(raw), dtype=info.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
