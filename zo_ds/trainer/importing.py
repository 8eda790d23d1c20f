"""`zo_ds import`: a .bin checkpoint becomes a folder with safetensors, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_ds.errors import ConfigError, DataError, MachineError
from zo_ds.files import make_folder, write_folder_atomically
from zo_ds.models.import_bin import BinFiles
from zo_ds.stores.base import Stored
from zo_ds.stores.shards import WrittenFile, write_weights

_TEXTS = ("*.json", "*.txt", "*.model", "merges")
"""Configuration and tokenizer. No code is copied, and no index of files that are not."""
_CONFIG = "config.json"


def import_model(source: Path, target: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write a model with .bin weights as a new folder in Hugging Face layout, with safetensors.

    At most one file of the checkpoint and one tensor are in memory at a time.

    Args:
        source: folder with pytorch_model.bin, or with shards of it and their index, and with config.json.
        target: folder to make; it appears when it is whole.
        dtype: of all weights that are floating-point numbers (float32, bfloat16 or float16); None: as they are.

    Returns:
        folder, tensors, bytes, files, and aliases: names left out because the tensor has another name as well.

    Raises:
        ConfigError: there is something at the target already.
        DataError: the checkpoint is missing, damaged, or more than tensors.
        MachineError: the disk refused it.
    """
    target = target.absolute()
    if os.path.lexists(target):
        raise ConfigError(
            "there is something at the target already", where=str(target), remedy="name a folder that does not exist"
        )
    files = BinFiles(source)
    settings = _settings(source, dtype)
    wanted = None if dtype is None else getattr(torch, dtype)
    tensors = [(name, _stored(files, name, wanted)) for name in files.entries]
    written: list[WrittenFile] = []

    def fill(folder: Path) -> None:
        for path in _texts(source):
            shutil.copyfile(path, folder / path.name)
        (folder / _CONFIG).write_text(settings, encoding="utf-8")
        written.extend(write_weights(folder, tensors))

    try:
        make_folder(target.parent)
        write_folder_atomically(target, fill)
    except OSError as error:
        raise MachineError(
            f"cannot write the model: {error.strerror or error}",
            where=str(target),
            remedy="free some space or choose another folder",
        ) from error
    return {
        "folder": str(target),
        "tensors": len(tensors),
        "bytes": sum(stored.nbytes for _, stored in tensors),
        "files": [file.name for file in written],
        "aliases": files.aliases,
    }


def _stored(files: BinFiles, name: str, dtype: torch.dtype | None) -> Stored:
    entry = files.entries[name]
    kept = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype

    def read() -> Tensor:
        return files.tensor(name).to(kept)

    return Stored(entry.shape, kept, read)


def _settings(source: Path, dtype: str | None) -> str:
    """The text of config.json, which says of what dtype the weights are."""
    path = source / _CONFIG
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text)
        if dtype is None:
            return text
        tree["torch_dtype" if "torch_dtype" in tree else "dtype"] = dtype
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            "the model has no readable config.json", where=str(path), why=str(error), remedy="download the file again"
        ) from error
    return json.dumps(tree, indent=2) + "\n"


def _texts(source: Path) -> list[Path]:
    names = [path for path in sorted(source.iterdir()) if any(fnmatch(path.name, kind) for kind in _TEXTS)]
    left = (_CONFIG, "*.index.json", ".*")
    return [path for path in names if path.is_file() and not any(fnmatch(path.name, kind) for kind in left)]
