"""Reads GGUF version 3 files: metadata, and tensors decoded to float32 one at a time, with numpy alone."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from zo_ds.errors import DataError

_MAGIC = b"GGUF"
_VERSION = 3
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class _Encoding:
    name: str
    block_elements: int
    block_bytes: int


_ENCODINGS = {
    0: _Encoding("F32", 1, 4),
    1: _Encoding("F16", 1, 2),
    2: _Encoding("Q4_0", 32, 2 + 16),
    3: _Encoding("Q4_1", 32, 2 + 2 + 16),
    8: _Encoding("Q8_0", 32, 2 + 32),
}


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    encoding: _Encoding
    start: int
    size: int


class _Tensors(Mapping[str, NDArray[np.float32]]):
    def __init__(self, data: NDArray[np.uint8], entries: dict[str, _Entry]) -> None:
        self._data, self._entries = data, entries

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self._entries[name]
        raw = self._data[entry.start : entry.start + entry.size]
        return _decode(raw, entry.encoding).reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        # Mapping's own test would decode the tensor to find out.
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Args:
        metadata: key to value; numbers, strings and lists of them as Python objects.
        tensors: name to float32 array, row-major with the outermost dimension first (the reverse of the order
            in the file). Every look-up decodes anew from the mapped file, so keep what is needed twice.
    """

    metadata: dict[str, Any]
    tensors: Mapping[str, NDArray[np.float32]]


class _Reader:
    """Takes values off the front of a mapped file and knows where it is when one cannot be taken."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.size, self.offset = path, len(mapped), 0
        self._view = memoryview(mapped)

    def fail(self, why: str, offset: int | None = None) -> NoReturn:
        at = self.offset if offset is None else offset
        raise DataError(
            "not a readable GGUF file",
            where=f"{self.path}: byte {at}",
            why=why,
            remedy="copy or download the file again; versions and encodings other than those of "
            "zo_ds.models.gguf need converting first",
        )

    def require(self, count: int, what: str) -> None:
        if count > self.size - self.offset:
            self.fail(f"{what} needs {count} bytes, but the file ends at byte {self.size}")

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        # The length is checked before struct sees it: a garbage count must not become a giant format.
        size = struct.calcsize(f"<{code}") * count
        self.require(size, what)
        values = struct.unpack_from(f"<{count}{code}", self._view, self.offset)
        self.offset += size
        return list(values)

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def string(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        self.require(length, what)
        start, self.offset = self.offset, self.offset + length
        try:
            return str(self._view[start : self.offset], "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8", start + error.start)

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self.number(self._code(kind, what), what)
        item_kind, count = self.number("I", what), self.number("Q", what)
        if item_kind != _STRING:
            return self.numbers(self._code(item_kind, what), count, what)
        return [self.string(f"item {i} of {what}") for i in range(count)]

    def _code(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            self.fail(f"{what} has the unknown value type {kind}")
        return _SCALARS[kind]


def read_gguf(path: Path | str) -> GGUFFile:
    """Opens a little-endian GGUF v3 file with tensors in F32, F16, Q4_0, Q4_1 or Q8_0.

    The whole description is checked here, so a file that opens can be decoded; the file stays mapped as long
    as the result is alive.

    Raises:
        DataError: the file is missing, cut short, garbage, or uses another version or encoding. The message
            gives the path and the byte offset.
    """
    path = Path(path)
    mapped = _map(path)
    reader = _Reader(path, mapped)
    if (magic := mapped[: len(_MAGIC)]) != _MAGIC:
        reader.fail(f"it starts with {magic!r}, not {_MAGIC!r}")
    reader.offset = len(_MAGIC)
    if (version := reader.number("I", "the version")) != _VERSION:
        reader.fail(f"version {version}; only {_VERSION} is known", len(_MAGIC))
    tensor_count, key_count = reader.numbers("Q", 2, "the header")
    metadata: dict[str, Any] = {}
    for i in range(key_count):
        key = reader.string(f"metadata key {i}")
        metadata[key] = reader.value(reader.number("I", f"the type of {key!r}"), f"the value of {key!r}")
    entries = _read_entries(reader, tensor_count, metadata)
    return GGUFFile(metadata, _Tensors(np.frombuffer(mapped, np.uint8), entries))


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(
            "cannot open the GGUF file",
            where=f"{path}: byte 0",
            why=str(error),
            remedy="check the path and that the file is not empty",
        ) from error


def _read_entries(reader: _Reader, count: int, metadata: dict[str, Any]) -> dict[str, _Entry]:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        reader.fail(f"general.alignment is {alignment!r}, not a power of two")
    described: list[tuple[str, _Entry]] = []
    for i in range(count):
        described.append(_read_entry(reader, f"tensor {i}"))
    base = -(-reader.offset // alignment) * alignment
    entries: dict[str, _Entry] = {}
    for name, entry in described:
        start = base + entry.start
        if name in entries:
            reader.fail(f"two tensors are named {name!r}")
        if start + entry.size > reader.size:
            reader.fail(f"the data of {name!r} ends at byte {start + entry.size} of {reader.size}", start)
        entries[name] = _Entry(entry.shape, entry.encoding, start, entry.size)
    return entries


def _read_entry(reader: _Reader, what: str) -> tuple[str, _Entry]:
    name = reader.string(f"the name of {what}")
    begin, rank = reader.offset, reader.number("I", f"the rank of {name!r}")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        reader.fail(f"{name!r} has {rank} dimensions", begin)
    shape = tuple(reversed(reader.numbers("Q", rank, f"the shape of {name!r}")))
    begin, kind = reader.offset, reader.number("I", f"the encoding of {name!r}")
    encoding = _ENCODINGS.get(kind)
    if encoding is None:
        known = ", ".join(known.name for known in _ENCODINGS.values())
        reader.fail(f"{name!r} has encoding {kind}; only {known} are known", begin)
    if shape[-1] % encoding.block_elements:
        reader.fail(f"rows of {name!r} do not fill blocks of {encoding.block_elements}", begin)
    size = math.prod(shape) // encoding.block_elements * encoding.block_bytes
    return name, _Entry(shape, encoding, reader.number("Q", f"the offset of {name!r}"), size)


def _decode(raw: NDArray[np.uint8], encoding: _Encoding) -> NDArray[np.float32]:
    if encoding.block_elements == 1:
        return raw.view("<f4" if encoding.name == "F32" else "<f2").astype(np.float32)
    blocks = raw.reshape(-1, encoding.block_bytes)
    scale = _halves(blocks[:, :2])
    if encoding.name == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(-1)
    packed = blocks[:, -16:]
    # A byte holds elements i (low half) and i + 16 (high half) of its block.
    levels = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    if encoding.name == "Q4_0":
        return (scale * (levels - 8)).reshape(-1)
    return (scale * levels + _halves(blocks[:, 2:4])).reshape(-1)


def _halves(columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)
