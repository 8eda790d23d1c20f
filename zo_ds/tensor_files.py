"""Safetensors files read piece by piece, straight to where the weights will live."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_ds.errors import DataError
from zo_ds.files import read_all

Source = Callable[[str, int, Tensor], None]
"""(name of a parameter, its first element wanted, flat tensor to be filled): where weights come from."""
BLOCK_BYTES = 16 * 2**20
"""Read at a time where the bytes must be converted."""
_LONGEST_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a file."""
_UNREAD = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64", "C64")
"""Kinds of numbers that nothing here reads; a file may hold some."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: number of its file.
        offset: of its first byte.
        dtype, shape: of the tensor.
    """

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of some safetensors files, by name.

    Args:
        paths: of the files; a name that is in several of them is the last one's.

    Raises:
        DataError: a file is missing, or is not whole.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._paths, self._handles = list(paths), list[int]()
        try:
            for number, path in enumerate(self._paths):
                self._handles.append(os.open(path, os.O_RDONLY))
                self.entries.update(_entries(path, self._handles[-1], number))
        except OSError as error:
            self.close()
            raise _unreadable(path, error.strerror or str(error)) from error
        except DataError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files."""
        while self._handles:
            with suppress(OSError):
                os.close(self._handles.pop())

    def __del__(self) -> None:
        self.close()

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill a flat tensor with the elements of a tensor from `start` on, rounded to its dtype.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it has fewer elements.
            DataError: the file cannot be read.
        """
        entry = self.entries[name]
        width = entry.dtype.itemsize
        if not 0 <= start <= start + out.numel() <= math.prod(entry.shape):
            raise ValueError(f"'{name}' has {math.prod(entry.shape)} elements, not {start + out.numel()}")
        if entry.dtype == out.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(entry, entry.offset + start * width, out)
            return
        step = BLOCK_BYTES // width
        block = torch.empty(min(step, out.numel()), dtype=entry.dtype)
        for at in range(0, out.numel(), step):
            part = block[: min(step, out.numel() - at)]
            self._fill(entry, entry.offset + (start + at) * width, part)
            out.narrow(0, at, part.numel()).copy_(part)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            KeyError, DataError: see `read`.
        """
        entry = self.entries[name]
        flat = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        self.read(name, 0, flat)
        return flat.view(entry.shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one after the other."""
        return ((name, self.tensor(name)) for name in self.entries)

    def _fill(self, entry: Entry, offset: int, out: Tensor) -> None:
        if not out.numel():
            return
        try:
            read_all(self._handles[entry.file], out.view(torch.uint8).numpy().data, offset)
        except OSError as error:
            raise _unreadable(self._paths[entry.file], error.strerror or str(error)) from error


def folder_files(folder: Path) -> TensorFiles:
    """All safetensors files of a folder.

    Raises:
        DataError: there are none, or one is not whole.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise DataError("there is no model", where=str(folder), remedy="the run must finish an evaluation to keep one")
    return TensorFiles(paths)


def _entries(path: Path, handle: int, number: int) -> dict[str, Entry]:
    size = os.fstat(handle).st_size
    head = os.pread(handle, 8, 0)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
        raise _unreadable(path, "it does not begin with a header")
    found: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    try:
        tree: dict[str, Any] = json.loads(os.pread(handle, length, 8))
        tree.pop("__metadata__", None)
        for name, value in tree.items():
            (first, last), shape = (_sizes(value[key]) for key in ("data_offsets", "shape"))
            spans.append((first, last))
            dtype = DTYPES.get(value["dtype"])
            if dtype is None and value["dtype"] in _UNREAD:
                continue
            if dtype is None:
                raise _unreadable(path, f"'{name}' is of an unknown kind, {value['dtype']!r}")
            if last - first != math.prod(shape) * dtype.itemsize:
                raise _unreadable(path, f"'{name}' is not as long as its shape says")
            found[name] = Entry(number, 8 + length + first, dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, f"its header cannot be understood ({error})") from error
    end = 0
    for first, last in sorted(spans):
        if first != end or last < first:
            raise _unreadable(path, "its tensors overlap or leave holes")
        end = last
    if end != size - 8 - length:
        raise _unreadable(path, f"its tensors have {end} bytes, it has {size - 8 - length}")
    return found


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        "cannot read weights", where=str(path), why=why, remedy="copy or download the file again (safetensors format)"
    )
