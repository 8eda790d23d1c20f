"""Host memory and files that shards live in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_ds.errors import ConfigError, MachineError
from zo_ds.files import reserve

_ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Bytes from the start of one shard to that of the next."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def nameless_file(folder: Path | None, size: int) -> Iterator[int]:
    """An open file without a name, which goes with the last process that uses it, however that ends.

    Args:
        folder: on the disk; None: in memory, whatever the size of /dev/shm.
        size: bytes, all of which are reserved.

    Raises:
        ConfigError: the folder is not there and its parent is not either.
        MachineError: there is no room for so many bytes.
    """
    where = f"deepspeed.zero_optimization.offload_param.nvme_path: {folder}" if folder else "shared host memory"
    handle = None
    try:
        if folder is None:
            handle = os.memfd_create("zo_ds weights")
        else:
            _make(folder, where)
            handle, name = tempfile.mkstemp(prefix="zo_ds-weights-", dir=folder)
            os.unlink(name)
        reserve(handle, max(1, size))
    except OSError as error:
        if handle is not None:
            os.close(handle)
        raise MachineError(
            f"cannot keep {size / 2**30:.2f} GiB of weights there: {error.strerror}",
            where=where,
            remedy="free some space, choose another folder, or a larger machine",
        ) from error
    try:
        yield handle
    finally:
        os.close(handle)


def _make(folder: Path, where: str) -> None:
    # Not its parents: a disk that is not mounted must not become a folder on the system's disk.
    if not folder.parent.is_dir():
        raise ConfigError(
            "there is no such folder for weights on disk",
            where=where,
            why=f"{folder.parent} does not exist",
            remedy="mount the disk, or correct the path",
        )
    folder.mkdir(exist_ok=True)


def map_file(process: int, handle: int, size: int) -> Tensor:
    """The bytes of a file that a process of this node holds open, shared between all that map it.

    Raises:
        MachineError: it cannot be mapped.
    """
    path = f"/proc/{process}/fd/{handle}"
    try:
        return torch.from_file(path, shared=True, size=max(1, size), dtype=torch.uint8)
    except RuntimeError as error:
        raise MachineError(
            "cannot share the weights between the ranks of this node",
            where=path,
            why=str(error).splitlines()[0],
            remedy="start the ranks in one container, as one user, or use parallel.layout=solo",
        ) from error


def pinned(size: int) -> Tensor:
    """Page-locked host memory of exactly this size; torch's own allocator would round it up to a power of two.

    Raises:
        MachineError: it cannot be locked.
    """
    memory = torch.empty(max(1, size), dtype=torch.uint8)
    pin(memory)
    return memory


def pin(memory: Tensor) -> None:
    """Lock pages for direct access by the GPU; does nothing where there is none.

    Raises:
        MachineError: they cannot be locked.
    """
    if not torch.cuda.is_available():
        return
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # not annotated by torch
    code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code:
        raise MachineError(
            f"cannot pin {memory.nbytes / 2**30:.2f} GiB of host memory",
            where="deepspeed.zero_optimization.offload_param.pin_memory",
            why=f"cudaHostRegister gave error {code}",
            remedy="set pin_memory to false, or raise the limit of locked memory (ulimit -l)",
        )


class Room:
    """Hands out slices of a region, one after the other.

    Args:
        memory: uint8.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._at = memory, 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many elements, flat."""
        nbytes = count * dtype.itemsize
        taken = self._memory.narrow(0, self._at, nbytes).view(dtype)
        self._at += aligned(nbytes)
        return taken
