"""First weights that the model itself must compute: made once, by one rank, and kept in the run directory.

A prefix begins with real keys and values (`zo_ds.models.adapter_start.keys_and_values`). Their last bits depend on the
machine, so they are not computed again: who goes on with a run, or replays it, reads them.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from zo_ds.engine.engine import ZOEngine
from zo_ds.errors import CorruptRunError
from zo_ds.models.load import LoadedModel
from zo_ds.parallel.channel import on_rank_0
from zo_ds.tensor_files import Source, folder_files
from zo_ds.trainer.report import log

START = "start"
"""Folder of a run directory: the adapter that the run began with, in peft's format."""


def begin(engine: ZOEngine, loaded: LoadedModel, run: Path, *, fresh: bool) -> None:
    """Give an engine the first weights that its model must compute, if there are such; collective.

    Args:
        engine: at its base weights.
        loaded: the model.
        run: directory; rank 0 reads and writes there.
        fresh: the run begins here, so that what is in the directory is of another one.

    Raises:
        DataError: what the run began with cannot be read.
        MachineError: it cannot be written.
    """
    if loaded.start is None:
        return
    compute = loaded.start
    kept = on_rank_0(engine.channel, lambda: None if fresh else read_start(run))
    raw = engine.channel.broadcast(b"" if kept is None else pack(kept))
    missing = not raw
    if missing:
        values = engine.call(lambda model, _: compute(model), None)
        if not values:
            log.warning("%s", "the model keeps no keys and values of a known shape: the prefix starts from noise")
            return
        raw = engine.channel.broadcast(pack(values))
    engine.load_weights(source_of_start(unpack(raw)))
    if missing:
        engine.save_pretrained(run / START)


def read_start(run: Path) -> dict[str, Tensor] | None:
    """What a run began with, by name; None if its base model has it all.

    Raises:
        DataError: it cannot be read.
    """
    folder = run / START
    return dict(folder_files(folder).tensors()) if folder.is_dir() else None


def source_of_start(values: Mapping[str, Tensor]) -> Source:
    """What fills parameters from these values, and leaves all others alone."""

    def fill(name: str, start: int, out: Tensor) -> None:
        if name in values:
            out.copy_(values[name].reshape(-1).narrow(0, start, out.numel()))

    return fill


def to_text(values: Mapping[str, Tensor] | None) -> str | None:
    """The same as text, for a journal that is shared."""
    return None if values is None else base64.b64encode(zlib.compress(pack(dict(values)))).decode("ascii")


def from_text(text: str | None, where: str) -> dict[str, Tensor] | None:
    """What `to_text` made into text.

    Raises:
        CorruptRunError: it is not that.
    """
    if text is None:
        return None
    try:
        values: dict[str, Tensor] = unpack(zlib.decompress(base64.b64decode(text, validate=True)))
    except (binascii.Error, ValueError, zlib.error, SafetensorError) as error:
        raise CorruptRunError("what the run began with cannot be read", where=where, why=str(error)) from error
    return values
