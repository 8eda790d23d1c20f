"""Weights as safetensors files in the Hugging Face layout, written tensor by tensor from where they lie.

The library's own writer wants a whole shard in memory; this one needs no copy, and hashes what it writes in blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zo_ds.errors import CorruptRunError
from zo_ds.files import sync_handle, write_all
from zo_ds.stores.base import Stored
from zo_ds.tensor_files import DTYPES

SHARD_BYTES = 5 * 2**30
BLOCK = 16 * 2**20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class WrittenFile:
    """A file that is on disk.

    Attributes:
        name: in its folder.
        size: in bytes.
        blocks: SHA-256 of every `BLOCK` bytes of it.
    """

    name: str
    size: int
    blocks: tuple[str, ...]


def write_weights(
    folder: Path,
    tensors: Sequence[tuple[str, Tensor | Stored]],
    *,
    stem: str = "model",
    on_read: Callable[[], None] | None = None,
) -> list[WrittenFile]:
    """Write model.safetensors, or shards of it with their index, and make them durable.

    Args:
        folder: exists.
        tensors: (name, tensor) in order, on any device.
        stem: of the files' names.
        on_read: called when the tensors are not needed any more; what follows is waiting for the disk.

    Raises:
        OSError: the disk refused it.
    """
    shards: list[list[tuple[str, Tensor | Stored]]] = [[]]
    held = 0
    for name, tensor in tensors:
        if held and held + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append((name, tensor))
        held += tensor.nbytes
    count = len(shards)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [f"{stem}.safetensors"] if count == 1 else names
    handles: list[int] = []
    files: list[WrittenFile] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            handles.append(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
            files.append(_write_shard(handles[-1], name, shard))
        if on_read is not None:
            on_read()
        if count > 1:
            total = sum(tensor.nbytes for _, tensor in tensors)
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, _ in shard}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
            name = f"{stem}.safetensors.index.json"
            handles.append(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
            write_all(handles[-1], index, 0)
            files.append(WrittenFile(name, len(index), (hashlib.sha256(index).hexdigest(),)))
        for handle in handles:
            sync_handle(handle)
    finally:
        for handle in handles:
            os.close(handle)
    return files


def _write_shard(handle: int, name: str, shard: Sequence[tuple[str, Tensor | Stored]]) -> WrittenFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, tensor in shard:
        entries[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink = _Sink(handle)
    sink.write(memoryview(struct.pack("<Q", len(text)) + text))
    for _, held in shard:
        if held.nbytes:
            tensor = held.read() if isinstance(held, Stored) else held
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            sink.write(flat.numpy().data)
    return WrittenFile(name, sink.at, sink.close())


class _Sink:
    """Writes in blocks, and hashes each."""

    def __init__(self, handle: int) -> None:
        self.at = 0
        self._handle = handle
        self._digest = hashlib.sha256()
        self._blocks: list[str] = []

    def write(self, data: memoryview) -> None:
        while len(data):
            piece = data[: BLOCK - self.at % BLOCK]
            write_all(self._handle, piece, self.at)
            self._digest.update(piece)
            self.at += len(piece)
            data = data[len(piece) :]
            if self.at % BLOCK == 0:
                self._next()

    def close(self) -> tuple[str, ...]:
        if self.at % BLOCK:
            self._next()
        return tuple(self._blocks)

    def _next(self) -> None:
        self._blocks.append(self._digest.hexdigest())
        self._digest = hashlib.sha256()


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are: file name, first byte, how many."""

    file: str
    start: int
    count: int


def places(folder: Path, files: Mapping[str, WrittenFile]) -> dict[str, Place]:
    """Where each tensor of a folder lies in its safetensors files.

    Args:
        folder: of the files.
        files: as they were written, by name.

    Raises:
        OSError: a file cannot be read.
        CorruptRunError: one is not as it was written.
    """
    found: dict[str, Place] = {}
    for name, file in files.items():
        if not name.endswith(".safetensors"):
            continue
        (length,) = struct.unpack("<Q", read_checked(folder, file, 0, 8))
        entries = json.loads(read_checked(folder, file, 8, length))
        for key, entry in entries.items():
            if key != "__metadata__":
                first, last = entry["data_offsets"]
                found[key] = Place(name, 8 + length + first, last - first)
    return found


def read_checked(folder: Path, file: WrittenFile, start: int, count: int) -> bytes:
    """Bytes of a file, after the blocks that hold them were checked.

    Raises:
        OSError: the file cannot be read.
        CorruptRunError: a block has another hash than when it was written.
    """
    first, last = start // BLOCK, (start + count - 1) // BLOCK
    with (folder / file.name).open("rb") as handle:
        handle.seek(first * BLOCK)
        raw = handle.read((last - first + 1) * BLOCK)
    blocks = [hashlib.sha256(raw[at : at + BLOCK]).hexdigest() for at in range(0, len(raw), BLOCK)]
    if tuple(blocks) != file.blocks[first : last + 1]:
        raise CorruptRunError(
            "a file is not as it was written",
            where=str(folder / file.name),
            why=f"a block from {first} to {last} has another SHA-256",
        )
    return raw[start - first * BLOCK :][:count]
