"""Buffers that a forward writes (step counters, running statistics) are put back, so that all probes start alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class BufferGuard:
    """Keeps copies of the buffers that a model was seen to change, and of all of them the first time.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._changing: set[tuple[int, str]] | None = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore every buffer on leaving, whether it was written in place or replaced."""
        before = [(owner, key, value) for owner in self._module.modules() for key, value in owner._buffers.items()]
        saved: list[tuple[nn.Module, str, Tensor, Tensor, int]] = [
            (owner, key, value, value.clone(), value._version)
            for owner, key, value in before
            if value is not None and (self._changing is None or (id(owner), key) in self._changing)
        ]
        try:
            yield
        finally:
            for owner, key, value in before:
                owner._buffers[key] = value
            written = [item for item in saved if item[2]._version != item[4]]
            for _, _, value, copy, _ in written:
                value.copy_(copy)
            self._changing = (self._changing or set()) | {(id(owner), key) for owner, key, _, _, _ in written}
