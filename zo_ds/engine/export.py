"""A tuned model, or an adapter, as a folder that `from_pretrained` loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from zo_ds.errors import ConfigError, MachineError
from zo_ds.files import write_folder_atomically
from zo_ds.maths.names import is_adapted
from zo_ds.stores.base import Stored, WeightStore
from zo_ds.stores.shards import write_weights

NOTE = "zo_ds.json"
"""Where the weights of a saved model come from."""


class Saveable(Protocol):
    """A tokenizer or configuration of transformers."""

    def save_pretrained(self, save_directory: Any, /) -> Any:
        """Write its files into a folder."""
        ...


def save_pretrained(
    store: WeightStore, folder: Path, tokenizer: Saveable | None = None, note: Mapping[str, Any] | None = None
) -> None:
    """Write config and safetensors files, without a copy in memory; an older model in the folder is replaced.

    Of a model that peft has wrapped, the adapter is written, in peft's own format.

    Args:
        store: holds the weights; if it is `collective`, the other ranks of its replica must `take_part`.
        folder: of the model.
        tokenizer: saved beside it.
        note: where the weights come from, kept as zo_ds.json.

    Raises:
        MachineError: the disk refused it; an older model is still whole.
        ConfigError: the model has an adapter that peft's format cannot hold.
    """
    adapted = is_adapted(store.module)
    if adapted or hasattr(store.module, "peft_config"):
        _check_adapter(store, adapted=adapted)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with every_entry_read(store, frozen=not adapted) as entries:
            write_folder_atomically(folder, lambda target: _fill(store, entries, target, tokenizer, note))
    except OSError as error:
        raise MachineError(
            f"cannot save the model: {getattr(error, 'strerror', None) or error}",
            where=str(folder),
            remedy="free some space or choose another folder",
        ) from error


def _check_adapter(store: WeightStore, *, adapted: bool) -> None:
    """Refuse what only peft's own code could save."""
    odd = [info.name for info in store.parameters.values() if info.name.startswith("prompt_encoder.")]
    if adapted and not odd:
        return
    raise ConfigError(
        "this adapter cannot be saved",
        where="engine.save_pretrained",
        why="peft saves what its encoder gives, not its weights" if adapted else "it was injected into the model",
        remedy="wrap the model with peft.get_peft_model, and use another method than p-tuning or prefix projection",
    )


def write_extras(store: WeightStore, tokenizer: Saveable | None, target: Path) -> None:
    """Write what `from_pretrained` needs beside the weights: configuration, generation defaults, tokenizer."""
    parts: tuple[Any, ...] = (getattr(store.module, "config", None), getattr(store.module, "generation_config", None))
    if is_adapted(store.module):
        parts = (_AdapterSettings(store.module),)
    for part in (*parts, tokenizer):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(target)


class _AdapterSettings:
    """adapter_config.json, as peft writes it.

    Args:
        module: what peft has wrapped.
    """

    def __init__(self, module: Any) -> None:
        self._base, self._settings = module.get_base_model(), copy.copy(module.peft_config[module.active_adapter])

    def save_pretrained(self, target: Path) -> None:
        """Write it into a folder."""
        settings, kind = self._settings, type(self._base)
        settings.inference_mode = True
        for key, value in vars(settings).items():
            if isinstance(value, set):
                setattr(settings, key, sorted(value))  # the same file every time
        # Without a task peft finds the model's class by this.
        named = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        settings.save_pretrained(str(target), auto_mapping_dict=named if settings.task_type is None else None)


@contextmanager
def every_entry_read(store: WeightStore, *, frozen: bool = True) -> Iterator[list[tuple[str, Tensor | Stored]]]:
    """The store's `views`; those that other ranks take part in are all read in the end, whatever goes wrong."""
    entries, left = store.views(frozen=frozen), list[Stored]()
    if store.collective:
        left = [held for _, held in entries if isinstance(held, Stored)]

        def counted(held: Stored) -> Stored:
            def read() -> Tensor:
                left.remove(held)
                return held.read()

            return replace(held, read=read)

        entries = [(name, counted(held) if isinstance(held, Stored) else held) for name, held in entries]
    try:
        yield entries
    finally:
        for held in list(left):
            held.read()


def _fill(
    store: WeightStore,
    entries: Sequence[tuple[str, Tensor | Stored]],
    target: Path,
    tokenizer: Saveable | None,
    note: Mapping[str, Any] | None,
) -> None:
    write_extras(store, tokenizer, target)
    if note is not None:
        (target / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    write_weights(target, entries, stem="adapter_model" if is_adapted(store.module) else "model")
