"""ZeRO-3 shards on disk: in memory only while a module computes with them, and one more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import Stored
from zo_ds.stores.disk import DiskFile, Extent, Pending
from zo_ds.stores.zero3 import Zero3Store, on_fetch, release, span


class Zero3DiskStore(Zero3Store):
    """theta in a file; `ds_tensor` is empty except between a fetch and a release.

    Args:
        module, parameters, structure: see `WeightStore`.
        handle: of an open file with room for all shards.
        folder: it lies in, for messages.
        resident: names of parameters that are not in the file, but where they are.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[nn.Parameter, ParamInfo],
        structure: NoiseStructure,
        handle: int,
        folder: Path,
        resident: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(module, parameters, structure)
        self._file = DiskFile(handle, folder, self.traffic)
        self._extents: dict[Any, Extent] = {}
        self._here: dict[Any, Tensor] = {}
        for name, parameter in module.named_parameters():
            if name not in resident:
                self._move(name, parameter)

    def _move(self, name: str, sharded: Any) -> None:
        shard, (start, used) = sharded.ds_tensor, span(sharded)
        extent = self._file.add(name, shard.ds_numel, used, sharded.dtype, start, self.parameters.get(sharded))
        self._extents[sharded] = extent
        if shard.data.numel():
            self._file.write(extent, shard.data.view(-1))
            shard.data = shard.data.new_empty(0)
        on_fetch(sharded, self._bring, self._let_go)

    @property
    def deferred_seconds(self) -> float:
        """See `WeightStore.deferred_seconds`."""
        return self._file.update_seconds

    @contextmanager
    def local_shard(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """The shard without its padding, in a buffer; what is changed in it goes to disk."""
        if parameter not in self._extents:
            with super().local_shard(parameter) as found:
                yield found
            return
        release(parameter)
        extent = self._extents[parameter]
        buffer = self._file.read(extent)
        try:
            yield extent.start, buffer.narrow(0, 0, extent.used)
            self._file.write(extent, buffer)
        finally:
            self._file.give_back(extent, buffer)

    def apply(self, plan: Plan, structure: NoiseStructure | None = None) -> None:
        """Have updates applied to each shard when it comes by next, see `DiskFile.update`."""
        self._apply_to([p for p in self.parameters if p not in self._extents], plan, structure)
        for parameter in self._extents:
            release(parameter)
        self._file.update(Pending(plan, structure or self.structure))

    def view(self, parameter: nn.Parameter) -> Tensor | Stored:
        """What reads the parameter, see `Stored`."""
        sharded: Any = parameter
        if sharded.ds_zero_partition_world_size > 1 or parameter not in self._extents:
            return super().view(parameter)
        extent, shape = self._extents[parameter], tuple(sharded.ds_shape)
        return Stored(shape, extent.dtype, lambda: self._file.copy(extent).narrow(0, 0, extent.used).view(shape))

    def close(self) -> None:
        """Let go of the file, and of the weights that are not in it."""
        super().close()
        self._file.close()

    def _bring(self, params: list[Any]) -> None:
        brought = [one for one in params if one in self._extents and one not in self._here]
        try:
            for sharded in brought:
                self._here[sharded] = self._file.read(self._extents[sharded])
                sharded.ds_tensor.data = self._here[sharded]
        except BaseException:
            self._let_go(brought)  # nobody else will: they were not fetched
            raise

    def _let_go(self, params: list[Any]) -> None:
        for sharded in params:
            if sharded in self._here and sharded.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                sharded.ds_tensor.data = torch.empty(0, dtype=sharded.dtype)
                self._file.give_back(self._extents[sharded], self._here.pop(sharded), shown=True)
