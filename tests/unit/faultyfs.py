"""A disk that fails: every call of `os` that changes a directory is counted, and one of them goes wrong.

It also knows what would be left after a power cut: of a file what it held at its last fsync, of a directory the names
it held at its own last fsync; of everything later nothing, or a random part.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = (
    "open",
    "pwrite",
    "write",
    "fsync",
    "replace",
    "rename",
    "mkdir",
    "unlink",
    "rmdir",
    "ftruncate",
    "posix_fallocate",
    "close",
)
_WRITES = ("pwrite", "write")
_REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}


Change = Callable[..., None]
"""Makes a change to a file's content, or only the given part of it."""


class Fault(Enum):
    """What goes wrong with a call."""

    EIO = "it fails"
    ENOSPC = "the disk is full"
    EINTR = "a signal interrupts it"
    SHORT = "half of it is written"
    FULL = "half of it is written, and no write after that until the space is freed"
    DEAD = "it fails, and all that follow until the disk is mended"
    CRASH_BEFORE = "the process is killed before it"
    CRASH_AFTER = "the process is killed after it"
    POWER_BEFORE = "the power fails before it"
    POWER_AFTER = "the power fails after it"

    @property
    def ends_it(self) -> bool:
        return self.value.startswith(("the process", "the power"))


class Crashed(BaseException):
    """The process is no more: nothing catches this, and nothing after it reaches the disk."""


@dataclass
class _File:
    """Attributes: content as of the last fsync; writes since; writes that a failed fsync may have lost."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)
    lost: list[Change] = field(default_factory=list)
    seen: bool = True


@dataclass
class _Folder:
    """Attributes: names now; names as of the last fsync; (name, what it names since) in order, None for nothing."""

    live: dict[str, _File | _Folder] = field(default_factory=dict)
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[dict[str, _File | _Folder | None]] = field(default_factory=list)


class FaultyFS:
    """Stands between `os` and one directory while `watching`.

    Args:
        root: the directory.
        fault: what goes wrong; None for nothing.
        at: with which of the calls, from 1.
        only: calls that are counted; others go through.
        storm: instead of one fault, one call in ten fails, and one in a hundred is when the power does.
    """

    def __init__(
        self,
        root: Path,
        fault: Fault | None = None,
        at: int = 0,
        only: tuple[str, ...] = CALLS,
        storm: random.Random | None = None,
    ) -> None:
        self.root, self.fault, self.at = root.absolute(), fault, at
        self.only = tuple(name for name in only if fault not in (Fault.SHORT, Fault.FULL) or name in _WRITES)
        self.storm = storm
        self.calls: list[str] = []
        self.hit: str | None = None
        self.crashed = self.ailing = False
        self._handles: dict[int, _File | _Folder] = {}
        self._tree = self._scan(self.root)

    @contextmanager
    def watching(self) -> Iterator[FaultyFS]:
        """Within this context the fault happens; a crash leaves it silently."""
        with mock.patch.multiple(os, **{name: self._wrapped(name) for name in CALLS}):
            try:
                yield self
            except Crashed:
                assert self.crashed
        if self.crashed:
            for handle in self._handles:
                _REAL["close"](handle)

    def mend(self) -> None:
        """The disk works again."""
        self.ailing = False

    def cut_power(self, survivors: random.Random | None = None) -> None:
        """Leave in the directory what was durable, and with ``survivors`` a random part of the rest."""
        shutil.rmtree(self.root)
        self._build(self._tree, self.root, survivors)

    # --- What goes wrong ---

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real, model = _REAL[name], getattr(self, f"_{name}")

        def call(first: Any, *rest: Any, **options: Any) -> Any:
            inside = first in self._handles if isinstance(first, int) else self._inside(first)
            if not inside:
                return real(first, *rest, **options)
            if self.crashed:
                raise Crashed
            fault = self._fault(name)
            if fault in (Fault.CRASH_BEFORE, Fault.POWER_BEFORE):
                self.crashed = True
                raise Crashed
            if fault in (Fault.EIO, Fault.ENOSPC, Fault.EINTR, Fault.DEAD):
                self._failed(name, first, fault)
                code = {Fault.ENOSPC: errno.ENOSPC, Fault.EINTR: errno.EINTR}.get(fault, errno.EIO)
                raise OSError(code, f"injected: {fault.value}")
            if fault is Fault.FULL and self.ailing:
                raise OSError(errno.ENOSPC, f"injected: {fault.value}")
            if fault in (Fault.SHORT, Fault.FULL):
                self.ailing = fault is Fault.FULL
                data = memoryview(rest[0])
                rest = (data[: max(1, len(data) // 2)], *rest[1:])
            try:
                return model(real, first, *rest, **options)
            finally:
                if fault in (Fault.CRASH_AFTER, Fault.POWER_AFTER):
                    self.crashed = True
                    raise Crashed

        return call

    def _fault(self, name: str) -> Fault | None:
        if self.ailing and self.fault is Fault.FULL and name in (*_WRITES, "posix_fallocate"):
            return self.fault
        if name not in self.only:
            return None
        if self.ailing and self.fault is Fault.DEAD:
            return self.fault
        self.calls.append(name)
        if self.storm is not None:
            worst = self.storm.randrange(100)
            kinds = [Fault.EIO, Fault.ENOSPC, Fault.EINTR, Fault.SHORT if name in _WRITES else Fault.EIO]
            self.hit = name if worst < 10 else self.hit
            return Fault.POWER_AFTER if worst == 0 else self.storm.choice(kinds) if worst < 10 else None
        if len(self.calls) != self.at:
            return None
        self.hit, self.ailing = name, self.fault is Fault.DEAD
        return self.fault

    def _failed(self, name: str, first: Any, fault: Fault) -> None:
        if name == "close":  # Linux closes it all the same
            self._close(_REAL["close"], first)
        node = self._handles.get(first) if isinstance(first, int) else None
        if name == "fsync" and isinstance(node, _File) and fault is not Fault.EINTR:
            # The kernel takes the pages for written from now on: a later fsync does not write them.
            node.lost += node.pending
            node.pending = []

    # --- What is where ---

    def _inside(self, path: Any) -> bool:
        absolute = Path(os.path.abspath(path))
        return absolute == self.root or self.root in absolute.parents

    def _scan(self, path: Path) -> _File | _Folder:
        if not path.is_dir():
            return _File(bytearray(path.read_bytes()))
        names = {name: self._scan(path / name) for name in os.listdir(path)}
        return _Folder(names, dict(names))

    def _node(self, path: Any) -> tuple[_Folder, str]:
        """(folder, name in it); things that were made behind our back come to light here."""
        absolute = Path(os.path.abspath(path))
        assert isinstance(self._tree, _Folder)
        at, here = self._tree, self.root
        for part in absolute.relative_to(self.root).parts[:-1]:
            self._discover(at, here, part)
            below = at.live.get(part)
            if not isinstance(below, _Folder):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            at, here = below, here / part
        self._discover(at, here, absolute.name)
        return at, absolute.name

    @staticmethod
    def _discover(folder: _Folder, path: Path, name: str) -> None:
        if name not in folder.live and (path / name).exists():
            unseen = _Folder() if (path / name).is_dir() else _File(seen=False)
            folder.live[name] = unseen
            folder.pending.append({name: unseen})

    # --- The calls ---

    def _open(self, real: Callable[..., int], path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if Path(os.path.abspath(path)) == self.root:
            handle = real(path, flags, *rest, **options)
            self._handles[handle] = self._tree
            return handle
        folder, name = self._node(path)
        handle = real(path, flags, *rest, **options)
        if name not in folder.live:
            folder.live[name] = _File()
            folder.pending.append({name: folder.live[name]})
        node = self._handles[handle] = folder.live[name]
        if flags & os.O_TRUNC and isinstance(node, _File):
            node.pending.append(_resized(0))
        return handle

    def _close(self, real: Callable[..., None], handle: int) -> None:
        del self._handles[handle]
        real(handle)

    def _pwrite(self, real: Callable[..., int], handle: int, data: Any, offset: int) -> int:
        done = real(handle, data, offset)
        self._file(handle).pending.append(_written(bytes(data)[:done], offset))
        return done

    def _write(self, real: Callable[..., int], handle: int, data: Any) -> int:
        offset = os.lseek(handle, 0, os.SEEK_CUR)
        done = real(handle, data)
        self._file(handle).pending.append(_written(bytes(data)[:done], offset))
        return done

    def _ftruncate(self, real: Callable[..., None], handle: int, size: int) -> None:
        real(handle, size)
        self._file(handle).pending.append(_resized(size))

    def _posix_fallocate(self, real: Callable[..., None], handle: int, offset: int, size: int) -> None:
        real(handle, offset, size)
        self._file(handle).pending.append(_grown(offset + size))

    def _fsync(self, real: Callable[..., None], handle: int) -> None:
        # The real one would only take its time.
        node = self._handles[handle]
        if isinstance(node, _Folder):
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            for name in os.listdir(path):
                self._discover(node, path, name)
            node.durable, node.pending = dict(node.live), []
            return
        if not node.seen:
            node.durable = bytearray(Path(f"/proc/self/fd/{handle}").read_bytes())
        for change in node.pending:
            change(node.durable)
        node.pending, node.lost = [], []

    def _replace(self, real: Callable[..., None], source: Any, target: Any) -> None:
        (folder, old), (other, new) = self._node(source), self._node(target)
        assert folder is other, "no rename to another folder is modelled"
        real(source, target)
        folder.live[new] = folder.live.pop(old)
        folder.pending.append({old: None, new: folder.live[new]})

    _rename = _replace

    def _mkdir(self, real: Callable[..., None], path: Any, *rest: Any, **options: Any) -> None:
        if Path(os.path.abspath(path)) == self.root:
            return real(path, *rest, **options)
        folder, name = self._node(path)
        real(path, *rest, **options)
        folder.live[name] = _Folder()
        folder.pending.append({name: folder.live[name]})
        return None

    def _unlink(self, real: Callable[..., None], path: Any, **options: Any) -> None:
        folder, name = self._node(path)
        real(path, **options)
        del folder.live[name]
        folder.pending.append({name: None})

    _rmdir = _unlink

    def _file(self, handle: int) -> _File:
        node = self._handles[handle]
        assert isinstance(node, _File)
        return node

    # --- After the cut ---

    def _build(self, node: _File | _Folder, path: Path, survivors: random.Random | None) -> None:
        if isinstance(node, _Folder):
            path.mkdir()
            names: dict[str, _File | _Folder | None] = dict(node.durable)
            # File systems may forget the last changes of a directory, but keep their order.
            for change in node.pending[: survivors.randint(0, len(node.pending)) if survivors else 0]:
                names.update(change)
            for name, below in names.items():
                if below is not None:
                    self._build(below, path / name, survivors)
            return
        content = bytearray(node.durable)
        for change in (*node.lost, *node.pending) if survivors else ():
            change(content, survivors.choice((0.0, survivors.random(), 1.0)))
        path.write_bytes(content)


def _written(data: bytes, offset: int) -> Change:
    def change(content: bytearray, part: float = 1.0) -> None:
        kept = data[: round(part * len(data))]
        content.extend(bytes(max(0, offset + len(kept) - len(content))))
        content[offset : offset + len(kept)] = kept

    return change


def _resized(size: int) -> Change:
    def change(content: bytearray, part: float = 1.0) -> None:
        if part >= 0.5:
            del content[size:]
            content.extend(bytes(size - len(content)))

    return change


def _grown(size: int) -> Change:
    def change(content: bytearray, part: float = 1.0) -> None:
        if part >= 0.5:
            content.extend(bytes(max(0, size - len(content))))

    return change
