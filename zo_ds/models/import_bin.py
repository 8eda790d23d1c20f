"""PyTorch .bin checkpoints, which are pickles. This file alone calls torch.load, and only `zo_ds import` uses it.

A pickle is a program. torch's restricted unpickler runs none of it but the making of tensors, yet it has had a hole
before (CVE-2025-32434, torch before 2.6). So whether a foreign pickle is opened stays a decision that somebody makes
once, by a command of its own and on any machine they like; all else here reads safetensors, which hold no program.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_ds.errors import DataError
from zo_ds.tensor_files import DTYPES

WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_RESERVED = "__metadata__"
_REMEDY = "download the file again, from a source you trust"


def holds_bin(folder: Path) -> bool:
    """Whether a folder has weights as .bin files."""
    return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


@dataclass(frozen=True)
class BinEntry:
    """A tensor of a checkpoint.

    Attributes:
        file: number of its file.
        dtype, shape: of the tensor.
    """

    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class BinFiles:
    """The tensors of a .bin checkpoint, by name. One of its files is open at a time, and mapped rather than read.

    (Files of before torch 1.6 are no archives and cannot be mapped: such a file is in memory while it is open.)

    Args:
        folder: with pytorch_model.bin, or with shards of it and their index.

    Attributes:
        entries: of every tensor, in the order of the files.
        aliases: other names of a tensor (tied weights), and the one that `entries` has.

    Raises:
        DataError: there is no such checkpoint, or a file is damaged, holds anything but tensors or wants to run code.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, BinEntry] = {}
        self.aliases: dict[str, str] = {}
        self._paths, promised = _files(folder)
        self._open: tuple[int, dict[str, Tensor]] | None = None
        for number, path in enumerate(self._paths):
            views: dict[Hashable, str] = {}
            for name, tensor in self._tensors(number).items():
                if name in self.entries or name in self.aliases:
                    raise _refused(path, f"'{name}' is in an earlier file, too")
                first = views.setdefault(_view(tensor), name) if tensor.numel() else name
                if first == name:
                    self.entries[name] = BinEntry(number, tensor.dtype, tuple(tensor.shape))
                else:
                    self.aliases[name] = first
            missing = promised[path.name] - self._tensors(number).keys()
            if missing:
                raise _refused(path, f"the index says that it holds '{min(missing)}', and it does not")
        if not self.entries:
            raise _refused(self._paths[0], "it holds no tensors")

    def tensor(self, name: str) -> Tensor:
        """A tensor; its memory is the mapped file's as long as that is open.

        Raises:
            KeyError: there is no such tensor.
            DataError: its file cannot be read any more.
        """
        return self._tensors(self.entries[name].file)[name]

    def _tensors(self, number: int) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != number:
            # The one before is let go of first.
            self._open = None
            self._open = (number, _load(self._paths[number]))
        return self._open[1]


def _files(folder: Path) -> tuple[list[Path], dict[str, set[str]]]:
    """The files of a checkpoint, and the names that the index promises for each."""
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder), remedy="give the folder of a downloaded model")
    if (folder / WHOLE).is_file():
        return [folder / WHOLE], {WHOLE: set()}
    index = folder / INDEX
    if not index.is_file():
        raise DataError(
            "there are no .bin weights to import",
            where=str(folder),
            why=f"it has neither {WHOLE} nor {INDEX}",
            remedy="a model with safetensors needs no import: give its folder as model.path",
        )
    promised: dict[str, set[str]] = {}
    try:
        for name, file in json.loads(index.read_bytes())["weight_map"].items():
            promised.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise _refused(index, f"the index cannot be understood ({type(error).__name__}: {error})") from error
    for file in promised:
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise _refused(index, f"it names the file {file!r}, which is not in the folder")
    if not promised:
        raise _refused(index, "it names no files")
    return [folder / file for file in sorted(promised)], promised


def _load(path: Path) -> dict[str, Tensor]:
    try:
        # Only archives can be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what damaged bytes raise within the unpickler has no common class
        raise _refused(path, _reason(error)) from error
    if not isinstance(found, dict):
        raise _refused(path, f"it holds a {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or name == _RESERVED:
            raise _refused(path, f"{name!r} is no name for a tensor")
        if problem := _problem(value):
            raise _refused(path, f"'{name}' {problem}")
    return dict(found)


def _problem(value: Any) -> str:
    """Why a value cannot be written as a plain tensor; empty if it can."""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.dtype not in DTYPES.values():
        return f"is of a kind that safetensors do not hold ({value.layout}, {value.dtype})"
    if value.device.type != "cpu":
        return "was saved without its values"
    if value.nbytes > value.untyped_storage().nbytes():
        return "is larger than what the file holds of it"
    return ""


def _view(tensor: Tensor) -> Hashable:
    where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*where, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _reason(error: Exception) -> str:
    """What to say of an error of torch.load, whose own text tells how to run the pickle nevertheless."""
    text = str(error).strip()
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"loading it would call {wanted[1]}; only tensors are taken from a pickle, and nothing was run"
    if text and isinstance(error, (OSError, RuntimeError)):
        return text.splitlines()[0]
    return "it is cut off, or no PyTorch checkpoint of tensors alone"


def _refused(path: Path, why: str) -> DataError:
    return DataError("cannot import the checkpoint", where=str(path), why=why, remedy=_REMEDY)
