"""A model without memory for its weights, and where to read them from: for what would not fit twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from zo_ds.errors import DataError
from zo_ds.maths.names import canonical_names
from zo_ds.tensor_files import Source, TensorFiles

log = logging.getLogger("zo_ds")


def open_checkpoint(
    kind: Any, source: str, settings: Any, dtype: torch.dtype, revision: str | None
) -> tuple[nn.Module, Source] | None:
    """A model whose parameters are on the meta device, and what fills them; None if transformers must load it.

    transformers renames, splits and joins the tensors of some architectures; here only those are taken whose checkpoint
    holds every parameter under its own name, or without the prefix of the head's base model.

    Args:
        kind: the auto class.
        source: folder or hub name.
        settings: the model's configuration.
        dtype: of the matrices.
        revision: of a hub model.

    Raises:
        OSError, ValueError: the model cannot be found or built.
        DataError: a file is damaged.
    """
    if getattr(settings, "quantization_config", None) is not None:
        return None
    paths = _files(source, revision)
    if not paths:
        return None
    with _parameters_on_meta():
        module = kind.from_config(settings, dtype=dtype)
    files = TensorFiles(paths)
    names = _names(module, files)
    if names is None or (dtype != torch.float32 and _keeps_fp32(module)):
        return None
    _fill_buffers(module, files, names)
    module.config.name_or_path = source
    if getattr(module, "can_generate", lambda: False)():
        with suppress(OSError):
            module.generation_config = transformers.GenerationConfig.from_pretrained(source, revision=revision)

    def fill(name: str, start: int, out: Tensor) -> None:
        files.read(names[name], start, out)

    return module, fill


def _files(source: str, revision: str | None) -> list[Path]:
    how = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **how)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **how)
    if index is None:
        return []
    shards, _ = get_checkpoint_shard_files(source, index, revision=revision)
    return [Path(shard) for shard in shards]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as they are registered; buffers, which no checkpoint may hold, are computed."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)

    kind: Any = nn.Module
    kind.register_parameter = register
    try:
        yield
    finally:
        kind.register_parameter = original


def _names(module: Any, files: TensorFiles) -> dict[str, str] | None:
    """Name in the checkpoint of every parameter (tied ones once) and buffer; None if a parameter is not there as is."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    known_as: dict[Tensor, list[str]] = {}
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        known_as.setdefault(tensor, []).append(name)
    names: dict[str, str] = {}
    for tensor, spellings in known_as.items():
        held = [key for name in spellings for key in (name, name.removeprefix(prefix)) if key in files.entries]
        held = [key for key in dict.fromkeys(held) if files.entries[key].shape == tuple(tensor.shape)]
        if held and all(_equal(files, held[0], other) for other in held[1:]):
            names[spellings[0]] = held[0]
        elif isinstance(tensor, nn.Parameter):
            log.debug("%s", f"'{spellings[0]}' is not in the checkpoint as it is; transformers loads the model")
            return None
    return names


def _equal(files: TensorFiles, one: str, other: str) -> bool:
    """Whether weights that the model ties are tied in the checkpoint as well; transformers unties them if not."""
    return torch.equal(files.tensor(one), files.tensor(other))


def _keeps_fp32(module: nn.Module) -> bool:
    """Whether transformers would hold some matrices in fp32 nevertheless."""
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return any(getattr(part, name, None) for part in module.modules() for name in kept)


def _fill_buffers(module: nn.Module, files: TensorFiles, names: dict[str, str]) -> None:
    for name, buffer in module.named_buffers():
        if name in names and buffer.numel():
            buffer.data.copy_(files.tensor(names[name]))


def source_of(module: nn.Module) -> Source:
    """What fills a model's parameters from another one that has them."""
    held = {name: parameter.data for parameter, name in canonical_names(module).items()}

    def fill(name: str, start: int, out: Tensor) -> None:
        if name not in held:
            raise DataError(f"the model has no '{name}'", where="model.path", remedy="use the model the run began with")
        out.copy_(held[name].reshape(-1).narrow(0, start, out.numel()))

    return fill
