"""Weights as ZeRO-3 shards, on the device or in host memory, without a DeepSpeed optimizer.

What a forward sees is a gathered copy; what is updated is the shard, where it lives. On a CPU in a world of one the
gathered "copy" is the shard itself, so writing to it would be a bug that only shows elsewhere: nothing here does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import Tensor, nn

from zo_ds.maths import noise
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import Stored, WeightStore

_HELD = "held by zo_ds"
"""Stands among the modules that use a parameter, so that DeepSpeed does not release it."""
_NOTHING: dict[torch.dtype, Tensor] = {}
"""What every hollow tensor of a dtype shows."""
Home = Callable[[str, int, Tensor], Tensor]
"""(name, elements of the shard, the whole parameter) -> where its shard lives; flat, contents do not matter."""


def shard(
    model: nn.Module,
    config: Mapping[str, Any],
    world: int,
    member: int,
    home: Home,
) -> None:
    """Turn every parameter into a shard before DeepSpeed would move the whole model to the device.

    Each parameter keeps its dtype. Buffers, which are never sharded, go to the device. DeepSpeed's own conversion moves
    whole parameters to the device, broadcasts them and copies; here a rank's shard goes straight to its home, and
    hollow parameters (see `hollow`) stay unfilled.

    Args:
        model: with parameters in host memory, or hollow ones.
        config: DeepSpeed's.
        world: ranks that share the parameters.
        member: this one's number.
        home: see `Home`.
    """
    init = deepspeed.zero.Init(config_dict_or_path=dict(config), dtype=torch.float32)
    device = torch.device(get_accelerator().current_device_name())
    for name, parameter in model.named_parameters():
        whole: Tensor = parameter.data
        count = -(-whole.numel() // world)
        place = home(name, count, whole)
        if not is_hollow(whole):
            mine = whole.reshape(-1)[min(whole.numel(), member * count) : (member + 1) * count]
            if place.data_ptr() != mine.data_ptr() or not mine.numel():
                place[: mine.numel()].copy_(mine)
        parameter.data = whole if is_hollow(whole) else torch.empty((), dtype=whole.dtype).expand(whole.shape)
        init._convert_to_deepspeed_param(parameter)
        _settle(parameter, place, count, world, device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _settle(parameter: Any, place: Tensor, count: int, world: int, device: torch.device) -> None:
    """What DeepSpeed notes of a parameter whose shard it has made."""
    shard: Any = place
    shard.requires_grad = False
    shard.ds_numel, shard.status, shard.final_location = count, PartitionedParamStatus.AVAILABLE, None
    parameter.ds_tensor, parameter.ds_numel_aligned = shard, count * world
    free_param(parameter)
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)


def hollow(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of a shape that takes no memory and holds nothing, to be filled where its shards live."""
    return _NOTHING.setdefault(dtype, torch.empty((), dtype=dtype)).expand(tuple(shape))


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor is one of `hollow`."""
    nothing = _NOTHING.get(tensor.dtype)
    return nothing is not None and tensor.data_ptr() == nothing.data_ptr()


class Zero3Store(WeightStore):
    """theta in `ds_tensor` shards.

    Args:
        module, parameters, structure: see `WeightStore`.
        part: (number, count) of this rank's part of each shard, where ranks of a node share the memory it lives in.
        apart: names of parameters that they do not share.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[nn.Parameter, ParamInfo],
        structure: NoiseStructure,
        part: tuple[int, int] = (0, 1),
        apart: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(module, parameters, structure)
        self._part = part
        self._apart = {parameter for name, parameter in module.named_parameters() if name in apart}
        for parameter in module.parameters():
            self._count_fetches(parameter)

    @contextmanager
    def local_shard(self, parameter: nn.Parameter) -> Iterator[tuple[int, Tensor]]:
        """The shard without its padding. A gathered copy is dropped first: it would go on showing old weights."""
        sharded: Any = parameter
        release(sharded)
        start, flat = self._mine(sharded, sharded.ds_tensor.data.view(-1))
        yield start, flat

    def _mine(self, sharded: Any, shard: Tensor) -> tuple[int, Tensor]:
        """(index in the whole parameter, elements) of what this rank updates."""
        first, last = self._part_of(sharded)
        return span(sharded)[0] + first, shard.narrow(0, first, last - first)

    def _part_of(self, sharded: Any) -> tuple[int, int]:
        """Within the shard: first element that this rank updates, and the one after its last."""
        count = span(sharded)[1]
        number, parts = (0, 1) if sharded in self._apart else self._part
        # Whole tiles of the noise: an op may want them aligned.
        step = math.ceil(count / parts / noise.TILE) * noise.TILE if parts > 1 else count
        return min(count, number * step), min(count, (number + 1) * step)

    @property
    def collective(self) -> bool:
        """Whether the parameters are shared out to several ranks."""
        sharded: Any = next(iter(self.parameters))
        return bool(sharded.ds_zero_partition_world_size > 1)

    def counts(self, parameter: nn.Parameter) -> bool:
        """See `WeightStore.counts`."""
        return parameter not in self._apart or self._part[0] == 0

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        """See `WeightStore.held`."""
        first, last = self._part_of(parameter)
        return span(parameter)[0] + first, last - first

    def apply(self, plan: Plan, structure: NoiseStructure | None = None) -> None:
        """See `WeightStore.apply`; shards on the device and in host memory are updated where they are."""
        self._apply_to(self.parameters, plan, structure)

    def _apply_to(self, parameters: Iterable[nn.Parameter], plan: Plan, structure: NoiseStructure | None) -> None:
        groups: dict[torch.device, list[tuple[Tensor, ParamInfo, int]]] = {}
        for parameter in parameters:
            with self.local_shard(parameter) as (start, flat):
                groups.setdefault(flat.device, []).append((flat, self.parameters[parameter], start))
        for group in groups.values():
            sites = [info.site(structure or self.structure, start) for _, info, start in group]
            ops.apply_([flat for flat, _, _ in group], sites, plan)

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The gathered parameter; every rank of the shard group must come here."""
        release(parameter)
        with self.gathered([parameter]):
            yield parameter.data

    def view(self, parameter: nn.Parameter) -> Tensor | Stored:
        """The shard, if it is the whole parameter; else a copy of it that every rank of the group must ask for."""
        sharded: Any = parameter
        if sharded.ds_zero_partition_world_size > 1:
            return Stored(tuple(sharded.ds_shape), parameter.dtype, lambda: self._copy(parameter))
        shard: Tensor = sharded.ds_tensor.data
        return shard.view(-1).narrow(0, 0, sharded.ds_numel).view(sharded.ds_shape)

    def _copy(self, parameter: nn.Parameter) -> Tensor:
        with self.whole(parameter) as tensor:
            return tensor.detach().to("cpu", copy=True)

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """One gather for all that happens within the context; DeepSpeed would release them after every module.

        DeepSpeed's own GatheredParameters makes a copy even where a parameter is whole.
        """
        held: list[Any] = [p for p in parameters if hasattr(p, "ds_active_sub_modules")]
        missing = [p for p in held if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather_coalesced(missing).wait()
        for parameter in held:
            parameter.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for parameter in held:
                parameter.ds_active_sub_modules.discard(_HELD)
            for parameter in missing:
                if not parameter.ds_active_sub_modules:
                    parameter.partition()

    def close(self) -> None:
        """Let go of the weights: DeepSpeed's own lists keep every module that it has sharded until the process ends."""
        for parameter in self.module.parameters():
            sharded: Any = parameter
            release(sharded)
            sharded.ds_tensor.data = torch.empty(0, dtype=parameter.dtype)

    def _count_fetches(self, parameter: Any) -> None:
        on_fetch(parameter, self._count)

    def _count(self, fetched: list[Any]) -> None:
        for parameter in fetched:
            shard = parameter.ds_tensor
            nbytes = shard.ds_numel * parameter.dtype.itemsize
            self.traffic.gathered += nbytes * (parameter.ds_zero_partition_world_size - 1)
            if shard.data.device != parameter.data.device:
                self.traffic.link += nbytes


def on_fetch(
    parameter: Any, before: Callable[[list[Any]], Any], after: Callable[[list[Any]], Any] | None = None
) -> None:
    """Do something whenever DeepSpeed fetches parameters through this one, and when it lets go of them.

    It gives every parameter functions of its own for that, and all its ways to weights lead through them.

    Args:
        parameter: a sharded one.
        before: gets the parameters that are about to be fetched.
        after: gets those that were released.
    """
    many, some, partition = parameter.all_gather_coalesced, parameter.all_gather, parameter.partition

    def all_gather_coalesced(params: Any, *args: Any, **kwargs: Any) -> Any:
        params = list(params)
        before(params)
        return many(params, *args, **kwargs)

    def all_gather(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        params = [parameter] if param_list is None else list(param_list)
        before([one for one in params if one.ds_status is ZeroParamStatus.NOT_AVAILABLE])
        return some(params, *args, **kwargs)

    def release_all(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        params = [parameter] if param_list is None else list(param_list)
        result = partition(params, *args, **kwargs)
        if after is not None:
            after(params)
        return result

    parameter.all_gather_coalesced, parameter.all_gather, parameter.partition = (
        all_gather_coalesced,
        all_gather,
        release_all,
    )


def span(sharded: Any) -> tuple[int, int]:
    """Which elements of a parameter are in this rank's shard: index of the first one, number without padding."""
    start = sharded.ds_tensor.ds_numel * sharded.ds_zero_partition_rank
    return start, max(0, min(sharded.ds_tensor.ds_numel, sharded.ds_numel - start))


def release(parameter: Any) -> None:
    """Drop a gathered copy. After a failed forward DeepSpeed believes that modules still use it."""
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:
        parameter.ds_active_sub_modules.clear()
        parameter.partition()
