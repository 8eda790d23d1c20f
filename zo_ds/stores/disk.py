"""Shards in a file: read ahead of the forward, checked, brought up to date on the way in, written back behind it.

Two buffers are enough: one that a module computes with, one that is being read. An update is not applied when it is
made but when its weights come by next, which saves reading all of them once more; nobody can see a shard that has not
had it.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zo_ds.errors import MachineError
from zo_ds.files import read_all, write_all
from zo_ds.maths.directions import NoiseStructure, ParamInfo, Site
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import Traffic
from zo_ds.stores.homes import aligned

_HASHED = (torch.float32, torch.bfloat16, torch.float16)


class Pending(NamedTuple):
    """An update that some shards have not had yet, and the structure of its directions."""

    plan: Plan
    structure: NoiseStructure


@dataclass
class Extent:
    """A shard's place in the file.

    Attributes:
        name: of the parameter.
        offset: first byte.
        count: elements, padding included.
        used: elements without padding.
        dtype: of them.
        start: index of the first one in the whole parameter.
        info: None if it is not trained.
        applied: updates that the bytes in the file have had.
        checksum: of those bytes.
    """

    name: str
    offset: int
    count: int
    used: int
    dtype: torch.dtype
    start: int
    info: ParamInfo | None
    applied: int = 0
    checksum: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.count * self.dtype.itemsize


class DiskFile:
    """The shards of a rank.

    Args:
        handle: of an open file with room for all of them; duplicated.
        folder: it lies in, for messages.
        traffic: where bytes are counted.

    Attributes:
        update_seconds: spent so far on applying updates.
    """

    def __init__(self, handle: int, folder: Path, traffic: Traffic) -> None:
        self._handle, self._folder, self._traffic = os.dup(handle), folder, traffic
        # Two, so that one shard is written back while the next one is read.
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="zo_ds disk")
        self._lock = threading.Lock()
        self.update_seconds = 0.0
        self._pending: list[Pending] = []
        self._first = 0
        self._coming: dict[str, Future[Tensor]] = {}
        self._next: dict[tuple[str | None, str | None], str] = {}
        self._last: tuple[str | None, str | None] = (None, None)
        self._free: dict[int, list[Tensor]] = {}
        self._extents: dict[str, Extent] = {}
        self._sizes = Counter[int]()
        self._used: set[str] = set()
        self._size = 0
        self._largest = 0

    def add(self, name: str, count: int, used: int, dtype: torch.dtype, start: int, info: ParamInfo | None) -> Extent:
        """Give a shard its place; see `Extent`."""
        extent = Extent(name, self._size, count, used, dtype, start, info)
        self._extents[name] = extent
        self._size += aligned(extent.nbytes)
        self._largest = max(self._largest, extent.nbytes)
        self._sizes[extent.nbytes] += 1
        return extent

    def update(self, pending: Pending) -> None:
        """Have an update applied to every trained shard before anybody sees it again."""
        self._pending.append(pending)
        self._drop_read_ahead()
        self._forget_the_applied()
        self._read_ahead()

    def read(self, extent: Extent) -> Tensor:
        """A shard as it must be now, flat [count], in a buffer that `give_back` takes; what follows it is read ahead.

        Raises:
            MachineError: it cannot be read or written back, or is not what was written.
        """
        coming = self._coming.pop(extent.name, None)
        if coming is None:
            self._drop_read_ahead()
        buffer = self._load(extent) if coming is None else coming.result()
        self._used.add(extent.name)
        self._next[self._last] = extent.name
        self._last = (self._last[1], extent.name)
        self._read_ahead()
        return buffer

    def write(self, extent: Extent, buffer: Tensor) -> None:
        """Replace a shard by what a buffer holds, unless that is what it was."""
        with extent.lock:
            self._write(extent, buffer)

    def copy(self, extent: Extent) -> Tensor:
        """A shard as it must be now, in memory of its own; for other threads, while forwards run."""
        with extent.lock:
            buffer = torch.empty(extent.count, dtype=extent.dtype)
            self._fetch(extent, buffer)
            self._apply(extent, buffer, self._missing(extent))
            return buffer

    def give_back(self, extent: Extent, buffer: Tensor, *, shown: bool = False) -> None:
        """Take back what `read` gave, to be used again.

        Args:
            extent: of the shard.
            buffer: of it.
            shown: a module has had it, which may have kept a view.
        """
        self._used.discard(extent.name)
        # Two references: the buffer, and the storage that is asked.
        if not shown or torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) <= 2:
            self._keep(buffer)

    def _keep(self, buffer: Tensor) -> None:
        with self._lock:
            kept = sum(size * len(buffers) for size, buffers in self._free.items())
            # Of sizes that come again soon, and no more than the largest shard has.
            if self._sizes[buffer.nbytes] > 1 and kept + buffer.nbytes <= self._largest:
                self._free.setdefault(buffer.nbytes, []).append(buffer)

    def close(self) -> None:
        """Let go of the file."""
        self._workers.shutdown(cancel_futures=True)
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def __del__(self) -> None:
        self.close()

    def _read_ahead(self) -> None:
        """Begin to read what came next the last time, as much as the largest shard has."""
        at, ahead = self._last, sum(self._extents[name].nbytes for name in self._coming)
        for _ in range(len(self._extents)):
            name = self._next.get(at)
            if name is None:
                return
            at = (at[1], name)
            if name in self._coming:
                continue
            if name in self._used:
                return  # an embedding that is the head as well: it is here
            extent = self._extents[name]
            if self._coming and ahead + extent.nbytes > self._largest:
                return
            ahead += extent.nbytes
            self._coming[name] = self._workers.submit(self._load, extent)

    def _drop_read_ahead(self) -> None:
        for future in self._coming.values():
            if not future.cancel():
                with suppress(MachineError):  # met again by whoever needs the shard
                    self._keep(future.result())
        self._coming.clear()

    def _load(self, extent: Extent) -> Tensor:
        with extent.lock:
            buffer = self._take(extent)
            self._fetch(extent, buffer)
            missing = self._missing(extent)
            if missing:
                self._apply(extent, buffer, missing)
                self._write(extent, buffer)
                extent.applied += len(missing)  # not before: a write that failed has changed nothing
            return buffer

    def _missing(self, extent: Extent) -> Sequence[Pending]:
        return self._pending[extent.applied - self._first :] if extent.info is not None else ()

    def _apply(self, extent: Extent, buffer: Tensor, missing: Sequence[Pending]) -> None:
        assert extent.info is not None or not missing
        begun = time.perf_counter()
        while missing:
            same = [one for one in missing if one.structure is missing[0].structure]
            joined = same if len(same) == len(missing) else missing[:1]
            assert extent.info is not None
            site = extent.info.site(joined[0].structure, extent.start)
            ops.apply_([buffer.narrow(0, 0, extent.used)], [site], Plan.joined([one.plan for one in joined]))
            missing = missing[len(joined) :]
        with self._lock:
            self.update_seconds += time.perf_counter() - begun

    def _forget_the_applied(self) -> None:
        trained = [extent for extent in self._extents.values() if extent.info is not None]
        done = min((extent.applied for extent in trained), default=0)
        del self._pending[: done - self._first]
        self._first = max(self._first, done)

    def _take(self, extent: Extent) -> Tensor:
        with self._lock:
            kept = self._free.get(extent.nbytes)
            if kept:
                return kept.pop().view(torch.uint8).view(extent.dtype)
        pinned = torch.cuda.is_available()
        return torch.empty(extent.nbytes, dtype=torch.uint8, pin_memory=pinned).view(extent.dtype)

    def _fetch(self, extent: Extent, buffer: Tensor) -> None:
        if extent.checksum is None:
            return  # nothing was ever written
        raw = _bytes(buffer)
        self._try(lambda: read_all(self._handle, raw, extent.offset), "read", extent)
        with self._lock:
            self._traffic.disk_read += len(raw)
        if _checksum(buffer) != extent.checksum:
            raise self._error("read", extent, "the bytes are not those that were written")

    def _write(self, extent: Extent, buffer: Tensor) -> None:
        checksum = _checksum(buffer)
        if checksum == extent.checksum:
            return
        raw = _bytes(buffer)
        self._try(lambda: write_all(self._handle, raw, extent.offset), "write", extent)
        extent.checksum = checksum
        with self._lock:
            self._traffic.disk_written += len(raw)

    def _try(self, work: Callable[[], None], verb: str, extent: Extent) -> None:
        try:
            work()
        except OSError as error:
            raise self._error(verb, extent, error.strerror or str(error)) from error

    def _error(self, verb: str, extent: Extent, why: str) -> MachineError:
        return MachineError(
            f"cannot {verb} weights on disk",
            where=f"'{extent.name}' in {self._folder} (offload_param.nvme_path)",
            why=why,
            remedy="every journalled step is safe: the same command goes on from it; if it happens again, choose "
            "another disk",
        )


def _bytes(buffer: Tensor) -> memoryview:
    return buffer.view(torch.uint8).numpy().data


def _checksum(buffer: Tensor) -> int:
    if buffer.dtype in _HASHED:
        return ops.state_hash(buffer, Site(0))
    return zlib.crc32(_bytes(buffer))
