"""Models and tokenizers through transformers: safetensors only, no code from the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from zo_ds.config.schema import ModelConfig
from zo_ds.errors import DataError
from zo_ds.models.catalog import model_dir
from zo_ds.models.checkpoint import open_checkpoint
from zo_ds.models.gguf_load import GGUF_FAILURES, check_package, find_gguf, make_savable, unpacked
from zo_ds.models.import_bin import holds_bin
from zo_ds.tensor_files import Source

_CLASSES = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
}
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm"}
"""Models whose positions count from behind the padding token's id, and so have fewer than their table holds."""
_FAILURES = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
_ARCHITECTURES = (("ForCausalLM", "causal_lm"), ("LMHeadModel", "causal_lm"), ("ForMaskedLM", "masked_lm"))


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        module: in evaluation mode; its parameters are on the CPU, or on the meta device until they are filled.
        tokenizer: a fast tokenizer.
        head: causal_lm, masked_lm or sequence_classification.
        max_tokens: the longest sequence it takes.
        source: fills the parameters with the base weights; None: `module` has them, and changes with training.
        start: gives some trained parameters, by name, their first values when all others have theirs; None if `source`
            or `module` has them.
    """

    module: nn.Module
    tokenizer: Any
    head: str
    max_tokens: int
    source: Source | None = None
    start: Callable[[nn.Module], dict[str, Tensor]] | None = None


def model_source(path: str) -> str:
    """The folder or hub name that `model.path` means; a `catalog:` model is fetched and converted on first use.

    Raises:
        DataError: it is neither a folder nor a possible hub name.
        ConfigError, MachineError: the catalogue does not know the name, or the package cannot be fetched.
    """
    kind, sign, name = path.partition(":")
    if sign and kind == "catalog":
        return str(model_dir(name))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_absolute() or path.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise DataError(
            "there is no such model folder",
            where=f"model.path = {path}",
            remedy="give a folder in Hugging Face layout, a hub name, or catalog:NAME",
        )
    return path


def load_model(config: ModelConfig, num_labels: int) -> LoadedModel:
    """Load model and tokenizer.

    A weight that the checkpoint does not hold (a new classification head) starts at zero, so that the base of a run is
    a pure function of the checkpoint.

    Args:
        config: which model, in which dtype.
        num_labels: outputs of a classification head.

    Raises:
        DataError: the model or its tokenizer cannot be found or read.
        ConfigError: a GGUF file needs a package that is not installed.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    source = model_source(config.path)
    failures = _FAILURES if config.gguf is None else _FAILURES + GGUF_FAILURES
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    try:
        if config.gguf is not None:
            source, common["gguf_file"] = find_gguf(source, config.gguf, config.revision)
        settings = transformers.AutoConfig.from_pretrained(source, **common)
        head = config.head if config.head != "auto" else _head_of(settings, config.gguf)
        extra = {"num_labels": num_labels} if head == "sequence_classification" else {}
        _check_labels(settings, head, num_labels)
        if extra:
            settings = transformers.AutoConfig.from_pretrained(source, **common, **extra)
        dtype = getattr(torch, config.dtype)
        opened = None
        if config.gguf is None:
            opened = open_checkpoint(_CLASSES[head], source, settings, dtype, config.revision)
        module, fill = opened or (_load_whole(_CLASSES[head], source, dtype, **common, **extra), None)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
    except failures as error:
        if config.gguf is not None:
            check_package(config.gguf, error)
        raise DataError(
            "cannot load the model",
            where=f"model.path = {config.path}",
            why=(str(error).strip() or type(error).__name__).splitlines()[0],
            remedy=_remedy(source),
        ) from error
    return LoadedModel(module.eval(), tokenizer, head, _max_tokens(settings, tokenizer), fill)


def _load_whole(kind: Any, source: str, dtype: torch.dtype, **how: Any) -> nn.Module:
    how |= unpacked() if "gguf_file" in how else {"use_safetensors": True}
    module, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **how)
    if "gguf_file" in how:
        make_savable(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in report["missing_keys"]:
                parameter.zero_()
        # transformers maps the file, whose next owner may write over it while a run goes on.
        for value in (*module.parameters(), *module.buffers()):
            value.data = value.data.clone()
    whole: nn.Module = module
    return whole


def _remedy(source: str) -> str:
    folder = Path(source)
    if holds_bin(folder) and not any(folder.glob("*.safetensors")):
        return f"its weights are pickles; rewrite them, and give the new folder: zo_ds import {source} NEW_FOLDER"
    return (
        "check the path or hub name; hub models need a network or a filled cache, and safetensors weights "
        "(`zo_ds import` rewrites those of a folder that has .bin files)"
    )


def _check_labels(settings: Any, head: str, num_labels: int) -> None:
    trained = any("ForSequenceClassification" in name for name in settings.architectures or [])
    if head == "sequence_classification" and trained and settings.num_labels != num_labels:
        raise DataError(
            f"the model's classification head has {settings.num_labels} classes, the task has {num_labels}",
            where="task.label_words",
            remedy="give as many label words, or start from a model without a trained head",
        )


def _max_tokens(settings: Any, tokenizer: Any) -> int:
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and settings.model_type in _POSITIONS_AFTER_PADDING:
        positions -= settings.pad_token_id + 1
    limits = (positions, getattr(tokenizer, "model_max_length", None))
    return min(int(limit) for limit in limits if limit)


def _head_of(settings: Any, gguf: str | None) -> str:
    if gguf is not None:
        # Such a file names no class; it is made for text generation.
        return "causal_lm"
    for architecture in settings.architectures or []:
        for ending, head in _ARCHITECTURES:
            if architecture.endswith(ending):
                return head
    return "sequence_classification"
