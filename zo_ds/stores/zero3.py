"""Weights as ZeRO-3 shards, on the device or offloaded to host memory, without a DeepSpeed optimizer.

What a forward sees is a gathered copy; what is updated is the shard, where it lives. On a CPU in a world of one the
gathered "copy" is the shard itself, so writing to it would be a bug that only shows elsewhere: nothing here does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from zo_ds.stores.base import WeightStore

_HELD = "held by zo_ds"
"""Stands among the modules that use a parameter, so that DeepSpeed does not release it."""


def partition(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Turn every parameter into a shard before DeepSpeed would move the whole model to the device.

    Each parameter keeps its dtype. Buffers, which are never sharded, go to the device.
    """
    deepspeed.zero.Init(module=model, config_dict_or_path=dict(config), dtype=torch.float32)
    device = torch.device(get_accelerator().current_device_name())
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


class Zero3Store(WeightStore):
    """theta in `ds_tensor` shards."""

    @contextmanager
    def local_shard(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """The shard without its padding. A gathered copy is dropped first: it would go on showing old weights."""
        sharded: Any = parameter
        _release(sharded)
        shard = sharded.ds_tensor
        start = shard.ds_numel * sharded.ds_zero_partition_rank
        count = max(0, min(shard.ds_numel, sharded.ds_numel - start))
        yield start, shard.data.view(-1).narrow(0, 0, count)

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The gathered parameter; every rank of the shard group must come here."""
        _release(parameter)
        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """One gather for all that happens within the context; DeepSpeed would release them after every module."""
        held: list[Any] = [p for p in parameters if hasattr(p, "ds_active_sub_modules")]
        with deepspeed.zero.GatheredParameters(held):
            for parameter in held:
                parameter.ds_active_sub_modules.add(_HELD)
            try:
                yield
            finally:
                for parameter in held:
                    parameter.ds_active_sub_modules.discard(_HELD)


def _release(parameter: Any) -> None:
    """Drop a gathered copy. After a failed forward DeepSpeed believes that modules still use it."""
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:
        parameter.ds_active_sub_modules.clear()
        parameter.partition()
