"""Weights as ZeRO-3 shards, on the device, in host memory or on disk, without a DeepSpeed optimizer.

What a forward sees is a gathered copy; what is updated is the shard, where it lives. On a CPU in a world of one the
gathered "copy" is the shard itself, so writing to it would be a bug that only shows elsewhere: nothing here does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from zo_ds.errors import MachineError
from zo_ds.files import reserve
from zo_ds.stores.base import WeightStore

_ALIGNMENT = 64
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


def move_to_disk(parameters: Iterable[nn.Parameter], folder: Path) -> None:
    """Back shards in host memory by a file that is mapped, so that the page cache decides what stays in memory.

    The file has no name: it goes with the process, however that ends.

    Args:
        parameters: of a model that DeepSpeed has taken over.
        folder: on the disk.

    Raises:
        MachineError: the folder does not take so many bytes.
    """
    shards: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    sizes = [-(-p.ds_tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for p in shards]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="zo_ds-weights-", dir=folder)
        try:
            reserve(handle, max(1, sum(sizes)))
            whole = torch.from_file(name, shared=True, size=max(1, sum(sizes)), dtype=torch.uint8)
        finally:
            os.close(handle)
            os.unlink(name)
    except (OSError, RuntimeError) as error:
        raise MachineError(
            f"cannot keep {sum(sizes) / 2**30:.2f} GiB of weights on disk: {getattr(error, 'strerror', None) or error}",
            where=f"deepspeed.zero_optimization.offload_param.nvme_path: {folder}",
            remedy="free some space there or choose another folder",
        ) from error
    at = 0
    for parameter, size in zip(shards, sizes, strict=True):
        shard = parameter.ds_tensor
        mapped = whole.narrow(0, at, shard.nbytes).view(shard.dtype)
        mapped.copy_(shard.data.view(-1))
        shard.data = mapped
        at += size


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

    def view(self, parameter: nn.Parameter) -> Tensor:
        """The shard, which in a world of one is the whole parameter."""
        sharded: Any = parameter
        shard: Tensor = sharded.ds_tensor.data
        return shard.view(-1).narrow(0, 0, sharded.ds_numel).view(sharded.ds_shape)

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
