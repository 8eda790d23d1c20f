"""Whole weights in this process's memory (DeepSpeed stage 0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zo_ds.maths.names import canonical_names
from zo_ds.stores.base import WeightStore, materialise
from zo_ds.tensor_files import Source


def fill_in_place(model: nn.Module, source: Source | None) -> None:
    """Give a model on the meta device its weights in host memory; does nothing if it has them (source is None)."""
    materialise(model, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    if source is not None:
        for parameter, name in canonical_names(model).items():
            source(name, 0, parameter.data.view(-1))


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
