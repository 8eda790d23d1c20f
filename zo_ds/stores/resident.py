"""Whole weights in this process's memory (DeepSpeed stage 0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from zo_ds.stores.base import WeightStore


class ResidentStore(WeightStore):
    """theta as ordinary parameters of the module."""

    @contextmanager
    def local_shard(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """The whole parameter, flat."""
        if not parameter.data.is_contiguous():
            parameter.data = parameter.data.contiguous()
        yield 0, parameter.data.view(-1)

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The parameter's data."""
        yield parameter.data

    def view(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's data."""
        return parameter.data
