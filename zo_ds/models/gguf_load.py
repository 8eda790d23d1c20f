"""GGUF files named in a recipe, through transformers: any architecture and encoding that it knows.

(`zo_ds.models.gguf` is another thing: a reader of llama files in five encodings that needs numpy alone, for the
catalogue's model. Both give the same weights where both can read.)
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import cached_file

from zo_ds.errors import ConfigError

GGUF_FAILURES = (struct.error, LookupError, TypeError, AttributeError, OverflowError, MemoryError)
"""What transformers raises, beside OSError and ValueError, for a damaged file."""


def find_gguf(source: str, name: str, revision: str | None) -> tuple[str, str]:
    """Folder and full path of a GGUF file of a model.

    Args:
        source: folder or hub name.
        name: of the file within it.
        revision: of a hub model.

    Raises:
        OSError: there is no such file.
    """
    # transformers takes a file of this name in the working directory before the model's, unless the path is absolute.
    path = Path(str(cached_file(source, name, revision=revision))).absolute()
    return str(path.parent), str(path)


def unpacked() -> dict[str, Any]:
    """Arguments of `from_pretrained` for plain matrices, where it could also compute on the file's packed blocks."""
    # Before there was a choice there was no such class either.
    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def make_savable(module: nn.Module) -> None:
    """Let a model forget that it was a GGUF file: it could not be saved, nor loaded once it is."""
    vars(module.config).pop("quantization_config", None)


def check_package(name: str, error: BaseException) -> None:
    """Say so if transformers failed because it reads this file with a package that is not there.

    Raises:
        ConfigError: it is.
    """
    if isinstance(error, ImportError) and find_spec("gguf") is None:
        raise ConfigError(
            "transformers needs the package gguf to read this file",
            where=f"model.gguf = {name}",
            why="it is not installed",
            remedy="pip install gguf",
        ) from error
