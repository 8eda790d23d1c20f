"""Adapters of the peft library on loaded models: what is trained is small, the model itself stays frozen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zo_ds.config.schema import ModelConfig, PeftConfig
from zo_ds.errors import ConfigError, DataError
from zo_ds.maths.names import canonical_names
from zo_ds.models.adapter_start import (
    embedding_rows,
    first_values,
    keys_and_values,
    token_ids,
    word_embeddings,
)
from zo_ds.models.checkpoint import source_of
from zo_ds.models.load import LoadedModel, load_model
from zo_ds.tensor_files import Source, TensorFiles

_TYPES = {"lora": "LORA", "ia3": "IA3", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}
_HEADS = ("classifier", "score")
"""What peft trains beside an adapter, in a model with a classification head."""
_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_adapted(model: ModelConfig, peft: PeftConfig, num_labels: int) -> LoadedModel:
    """Load a model and put an adapter on it.

    Raises:
        ConfigError, DataError: see `load_model` and `adapt`.
    """
    return adapt(load_model(model, num_labels), peft)


def base_source(model: ModelConfig, peft: PeftConfig, num_labels: int, loaded: LoadedModel) -> Source:
    """What gives the first weights again, after training has changed those of the model.

    Raises:
        ConfigError, DataError: see `load_adapted`.
    """
    return loaded.source or source_of(load_adapted(model, peft, num_labels).module)


def adapt(loaded: LoadedModel, config: PeftConfig) -> LoadedModel:
    """Freeze a model but for what a method trains; except for `bias`, it is wrapped by peft then.

    Parameters on the meta device stay there, and so do the adapter's: `source` fills both. Otherwise the adapter is
    filled here.

    Args:
        loaded: changed in place.
        config: which adapter.

    Raises:
        ConfigError: peft cannot adapt such a model this way, or it has no biases.
        DataError: the adapter to go on from cannot be read, or is of another model.
    """
    if config.method == "none":
        return loaded
    if config.method == "bias":
        return _only_biases(loaded)
    base = {parameter: name for name, parameter in loaded.module.named_parameters()}
    read = loaded.source or source_of(loaded.module)
    settings, ids = _settings(loaded, config)
    rows = _rows(loaded.module, settings, read, ids) if config.method == "prompt" else None
    module = _wrap(loaded, settings)
    names = canonical_names(module)
    new = {name: parameter for parameter, name in names.items() if parameter not in base}
    held = {name: base[parameter] for parameter, name in names.items() if parameter in base}
    if config.path is None:
        held |= _copies(new, set(held.values()))
    shapes = {name: tuple(parameter.shape) for name, parameter in new.items() if name not in held}
    first = first_values(shapes, config.seed, rows) if config.path is None else _weights(config.path, shapes)

    def fill(name: str, begin: int, out: Tensor) -> None:
        if name in held:
            read(held[name], begin, out)
        else:
            first(name, begin, out)

    if loaded.source is None:
        for name, parameter in new.items():
            fill(name, 0, parameter.data.view(-1))
    return replace(
        loaded,
        module=module.eval(),
        max_tokens=loaded.max_tokens - (getattr(settings, "num_virtual_tokens", None) or 0),
        source=None if loaded.source is None else fill,
        start=_from_activations(ids) if config.method == "prefix" and ids else None,
    )


def _only_biases(loaded: LoadedModel) -> LoadedModel:
    found = 0
    for name, parameter in loaded.module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
        found += name.endswith("bias")
        if parameter.dim() < 2:
            # Trained ones are held in fp32, and a layer norm takes its weight and its bias in one dtype only.
            parameter.data = parameter.data.float()
    if not found:
        raise ConfigError(
            "the model has no biases to train",
            where="peft.method = bias",
            why=f"no parameter of {type(loaded.module).__name__} is named so (Llama's layers, for one, have none)",
            remedy="choose another method: lora, ia3, prefix or prompt",
        )
    return loaded


def _settings(loaded: LoadedModel, config: PeftConfig) -> tuple[Any, list[int]]:
    """For peft; and the tokens that a soft prompt starts from, none if it starts otherwise or is none."""
    settings, ids = _new(loaded, config), list[int]()
    if config.path is not None:
        settings = _saved(config, Path(config.path).expanduser(), settings.task_type)
    elif config.method in ("prefix", "prompt") and config.start == "tokens":
        model: Any = loaded.module
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = token_ids(loaded.tokenizer, config.start_text, config.virtual_tokens, vocabulary, config.seed)
    name = getattr(getattr(loaded.module, "config", None), "name_or_path", None)
    settings.base_model_name_or_path = name or None
    return settings, ids


def _rows(module: nn.Module, settings: Any, read: Source, ids: list[int]) -> Callable[[], Tensor] | None:
    """What gives the embeddings that a prompt starts from; None if it starts otherwise."""
    table, width = word_embeddings(module)
    settings.token_dim = width  # OPT-350M has narrower embeddings than layers
    return (lambda: embedding_rows(read, table, width, ids)) if ids else None


def _new(loaded: LoadedModel, config: PeftConfig) -> Any:
    """For a new adapter."""
    import peft

    soft = config.method in ("prefix", "prompt")
    # peft has no masked LMs. Its feature extraction puts soft prompts before any model; others need no task.
    task = _TASKS.get(loaded.head, "FEATURE_EXTRACTION" if soft else None)
    if soft:
        kind = peft.PrefixTuningConfig if config.method == "prefix" else peft.PromptTuningConfig
        return kind(task_type=task, num_virtual_tokens=config.virtual_tokens)
    chosen = None if config.target_modules == "auto" else list(config.target_modules)
    if config.method == "ia3":
        return peft.IA3Config(task_type=task, target_modules=chosen)
    return peft.LoraConfig(task_type=task, r=config.r, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=chosen)


def _saved(config: PeftConfig, folder: Path, task: str | None) -> Any:
    """The settings of a saved adapter."""
    import peft

    if not (folder / _SETTINGS).is_file():
        raise DataError(
            "there is no adapter",
            where=f"peft.path = {config.path}",
            why=f"the folder holds no {_SETTINGS}",
            remedy="give a folder that peft's save_pretrained, or zo_ds, has written",
        )
    try:
        kind = json.loads((folder / _SETTINGS).read_text(encoding="utf-8")).get("peft_type")
        if kind != _TYPES[config.method]:
            raise ConfigError(
                f"the saved adapter is of another kind, {kind}",
                where=f"peft.path = {config.path}",
                remedy=f"set peft.method to what it is (this one is {config.method})",
            )
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError("cannot read the adapter", where=str(folder / _SETTINGS), why=str(error)) from error
    settings.inference_mode, settings.task_type = False, task
    if getattr(settings, "modules_to_save", None):
        settings.modules_to_save = [name for name in settings.modules_to_save if name not in _HEADS] or None
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # the weights are there: nothing is computed from the base model
    return settings


def _weights(path: str, shapes: Mapping[str, Any]) -> Source:
    """What gives the weights of a saved adapter."""
    folder = Path(path).expanduser()
    if not (folder / _WEIGHTS).is_file():
        raise DataError(
            "the adapter has no weights", where=str(folder / _WEIGHTS), remedy="save it with safe_serialization=True"
        )
    files = TensorFiles([folder / _WEIGHTS])
    differ = [n for n, shape in shapes.items() if n not in files.entries or files.entries[n].shape != tuple(shape)]
    if differ:
        raise DataError(
            "the adapter is of another model",
            where=str(folder),
            why=f"'{differ[0]}' is not there, or has another shape",
            remedy="use the base model that it was made for (base_model_name_or_path in its adapter_config.json)",
        )
    return files.read


def _wrap(loaded: LoadedModel, settings: Any) -> Any:
    """The model as peft wraps it."""
    import peft

    # What peft draws is written over; the generator of the process is left as it was.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = peft.get_peft_model(loaded.module, settings, low_cpu_mem_usage=loaded.source is not None)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"peft cannot put this adapter on a {type(loaded.module).__name__}",
                where="peft",
                why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                remedy="name layers of the model in peft.target_modules, or choose another peft.method",
            ) from error
    return module


def _copies(new: Iterable[str], base: Collection[str]) -> dict[str, str]:
    """Parameters of a head that is trained beside an adapter, and those in the base model that they begin as."""
    found: dict[str, str] = {}
    for name in new:
        within = name.removeprefix("base_model.")
        for own in (within, within.removeprefix("model.")):
            if own in base:
                found[name] = own
    return found


def _from_activations(ids: list[int]) -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda model: keys_and_values(model, ids)
