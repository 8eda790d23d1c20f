"""Buffers that a forward writes (step counters, running statistics) are put back, so that all probes start alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class BufferGuard:
    """Keeps copies of a model's buffers while it runs.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore every buffer on leaving, whether it was written in place or replaced."""
        before = [(owner, key, value) for owner in self._module.modules() for key, value in owner._buffers.items()]
        # Version counters would be cheaper, but kernels such as batch_norm write without counting.
        copies = [None if value is None else value.clone() for _, _, value in before]
        try:
            yield
        finally:
            for (owner, key, value), copy in zip(before, copies, strict=True):
                owner._buffers[key] = value
                if value is not None and copy is not None and not torch.equal(value, copy):
                    value.copy_(copy)
