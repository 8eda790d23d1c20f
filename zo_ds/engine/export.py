"""A tuned model as a folder that `from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from zo_ds.errors import ConfigError, MachineError
from zo_ds.files import write_folder_atomically
from zo_ds.stores.base import WeightStore

SHARD_BYTES = 5 * 2**30


class Saveable(Protocol):
    """A tokenizer or configuration of transformers."""

    def save_pretrained(self, save_directory: Any, /) -> Any:
        """Write its files into a folder."""
        ...


def save_pretrained(store: WeightStore, folder: Path, tokenizer: Saveable | None = None) -> None:
    """Write config and safetensors shards, one shard in memory at a time; an older model in the folder is replaced.

    Args:
        store: holds the weights; every rank of its shard group must come here.
        folder: of the model.
        tokenizer: saved beside it.

    Raises:
        MachineError: the disk refused it; an older model is still whole.
        ConfigError: the model is an adapter model, whose own names no `from_pretrained` would find.
    """
    if hasattr(store.module, "peft_config"):
        raise ConfigError(
            "this model is a PEFT adapter on a base model",
            where="engine.save_pretrained",
            why="its parameter names are those of the wrapper",
            remedy="save the adapter in its own format: engine.module.save_pretrained(folder)",
        )
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder_atomically(folder, lambda target: _fill(store, target, tokenizer))
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"cannot save the model: {getattr(error, 'strerror', None) or error}",
            where=str(folder),
            remedy="free some space or choose another folder",
        ) from error


def _fill(store: WeightStore, target: Path, tokenizer: Saveable | None) -> None:
    parts = (getattr(store.module, "config", None), getattr(store.module, "generation_config", None), tokenizer)
    for part in parts:
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(target)
    _save_shards(store, target)


def _save_shards(store: WeightStore, target: Path) -> None:
    tied = _tied_names(store.module)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    files: list[Path] = []
    total = held = 0

    def flush() -> None:
        nonlocal held
        files.append(target / f"shard-{len(files)}.tmp")
        save_file(shard, files[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, str(len(files) - 1)))
        shard.clear()
        held = 0

    for name, tensor in store.state_dict():
        if name in tied:
            continue
        if held and held + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(target / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(target / name)
    index = {"metadata": {"total_size": total}, "weight_map": {k: names[int(v)] for k, v in weight_map.items()}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _tied_names(module: torch.nn.Module) -> set[str]:
    """Names that repeat an earlier parameter; safetensors holds it once and `from_pretrained` ties it again."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if first[id(parameter)] != name}
