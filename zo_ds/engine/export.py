"""A tuned model as a folder that `from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from zo_ds.errors import ConfigError, MachineError
from zo_ds.files import write_folder_atomically
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

    Args:
        store: holds the weights; if it is `collective`, the other ranks of its replica must `take_part`.
        folder: of the model.
        tokenizer: saved beside it.
        note: where the weights come from, kept as zo_ds.json.

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
        with every_entry_read(store) as entries:
            write_folder_atomically(folder, lambda target: _fill(store, entries, target, tokenizer, note))
    except OSError as error:
        raise MachineError(
            f"cannot save the model: {getattr(error, 'strerror', None) or error}",
            where=str(folder),
            remedy="free some space or choose another folder",
        ) from error


def write_extras(store: WeightStore, tokenizer: Saveable | None, target: Path) -> None:
    """Write what `from_pretrained` needs beside the weights: configuration, generation defaults, tokenizer."""
    parts = (getattr(store.module, "config", None), getattr(store.module, "generation_config", None), tokenizer)
    for part in parts:
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(target)


@contextmanager
def every_entry_read(store: WeightStore) -> Iterator[list[tuple[str, Tensor | Stored]]]:
    """The store's `views`; those that other ranks take part in are all read in the end, whatever goes wrong."""
    entries, left = store.views(), list[Stored]()
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
    write_weights(target, entries)
