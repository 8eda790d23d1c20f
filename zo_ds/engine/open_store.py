"""From a module to a store: where weights live, by ZeRO stage, offload and layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from zo_ds.config.deepspeed import split_off
from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.layout import Kind, Layout
from zo_ds.stores.base import WeightStore, materialise, trainable_parameters
from zo_ds.stores.homes import Room, aligned, map_file, nameless_file, pin, pinned
from zo_ds.stores.resident import ResidentStore
from zo_ds.stores.zero3 import Home, Zero3Store, hollow, is_hollow, shard
from zo_ds.stores.zero3_disk import Zero3DiskStore
from zo_ds.tensor_files import Source


def open_store(
    model: nn.Module,
    resolved: Mapping[str, Any],
    structure: NoiseStructure,
    layout: Layout,
    channel: Channel,
    weights: Source | None = None,
    resident: frozenset[str] = frozenset(),
) -> tuple[WeightStore, deepspeed.DeepSpeedEngine]:
    """Hand a model to DeepSpeed; collective.

    Args:
        model: parameters on the meta device are filled from `weights`, straight where they will live.
        resolved: DeepSpeed's configuration.
        structure: of the noise.
        layout: who holds the weights.
        channel: to the other ranks.
        weights: where they come from; None: the model has them.
        resident: names of parameters that stay on the device although others are offloaded.

    Raises:
        ConfigError: DeepSpeed cannot hold such a parameter, or the folder for weights on disk is not there.
        MachineError: there is no room for the weights.
    """
    told, disk, small = split_off(resolved)
    sharded = told["zero_optimization"]["stage"] == 3
    device = torch.device(get_accelerator().current_device_name())
    materialise(
        model, hollow if sharded else lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=device)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                "DeepSpeed cannot hold a parameter without dimensions", where=name, remedy="give it the shape [1]"
            )
    if sharded:
        # Of a shard group, every rank has a part of every parameter.
        kept = {name for name, p in model.named_parameters() if p.numel() <= small and not layout.lockstep}
        resident = frozenset() if layout.lockstep else resident | kept
        opened = _sharded(model, told, disk, structure, layout, channel, resident)
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        parameters = trainable_parameters(model)
        engine = _hand_over(model, told)
        opened = ResidentStore(model, parameters, structure), engine
    store, engine = opened
    if weights is not None:
        store.fill(weights)
    if layout.shares_memory:
        channel.barrier()
    return store, engine


def _hand_over(model: nn.Module, told: Mapping[str, Any]) -> deepspeed.DeepSpeedEngine:
    engine, *_ = deepspeed.initialize(model=model, config=dict(told))
    # They pass every input through autograd, which no forward here needs and which changes what a module sees:
    # `query is key` no longer holds, and attention takes another kernel than with resident weights.
    for hook in getattr(engine.optimizer, "backward_hooks", []):
        hook.remove()
    engine.eval()
    return engine


def _sharded(
    model: nn.Module,
    told: Mapping[str, Any],
    disk: Path | None,
    structure: NoiseStructure,
    layout: Layout,
    channel: Channel,
    resident: frozenset[str],
) -> tuple[WeightStore, deepspeed.DeepSpeedEngine]:
    world, member = (layout.size, layout.member) if layout.lockstep else (1, 0)
    parameters = trainable_parameters(model)
    away = [(name, p) for name, p in model.named_parameters() if name not in resident]
    size = sum(aligned(-(-p.numel() // world) * p.dtype.itemsize) for _, p in away)
    if layout.kind is Kind.SHARED_HOST:
        room = Room(_shared(disk, size, layout, channel))
        home = _on_device(resident, lambda name, count, whole: room.take(count, whole.dtype))
        shard(model, told, world, member, home)
        engine = _hand_over(model, told)
        part = (layout.member, layout.size)
        return Zero3Store(model, parameters, structure, part, resident), engine
    if disk is None:
        shard(model, told, world, member, _on_device(resident, _home(told, size)))
        engine = _hand_over(model, told)
        return Zero3Store(model, parameters, structure), engine
    with nameless_file(disk, size) as handle:
        home = _on_device(resident, _only_what_is_there)
        shard(model, told, world, member, home)
        engine = _hand_over(model, told)
        return Zero3DiskStore(model, parameters, structure, handle, disk, resident), engine


def _on_device(resident: frozenset[str], others: Home) -> Home:
    """Homes on the device for some parameters."""
    device = torch.device(get_accelerator().current_device_name())

    def home(name: str, count: int, whole: Tensor) -> Tensor:
        return torch.empty(count, dtype=whole.dtype, device=device) if name in resident else others(name, count, whole)

    return home


def _home(told: Mapping[str, Any], size: int) -> Home:
    offload = told["zero_optimization"].get("offload_param") or {}
    if offload.get("device", "none") == "none":
        device = torch.device(get_accelerator().current_device_name())
        if device.type != "cpu":
            return lambda name, count, whole: torch.empty(count, dtype=whole.dtype, device=device)
    elif offload.get("pin_memory") and torch.cuda.is_available():
        room = Room(pinned(size))
        return lambda name, count, whole: room.take(count, whole.dtype)
    return _in_place


def _in_place(name: str, count: int, whole: Tensor) -> Tensor:
    """Where a whole parameter lies already, if it does."""
    if count == whole.numel() and not is_hollow(whole) and whole.is_contiguous() and whole.device.type == "cpu":
        return whole.view(-1).data  # not a view: those keep their base
    return torch.empty(count, dtype=whole.dtype)


def _only_what_is_there(name: str, count: int, whole: Tensor) -> Tensor:
    """Shards that go to disk need memory only while they are taken over from a whole parameter."""
    return torch.empty(0 if is_hollow(whole) else count, dtype=whole.dtype)


def _shared(disk: Path | None, size: int, layout: Layout, channel: Channel) -> Tensor:
    """Memory, or a mapped file, that all ranks of this node see."""
    if layout.member == 0:
        with nameless_file(disk, size) as handle:
            return _map(os.getpid(), handle, size, layout, channel)
    return _map(0, 0, size, layout, channel)


def _map(process: int, handle: int, size: int, layout: Layout, channel: Channel) -> Tensor:
    told = channel.all_gather(torch.tensor([process, handle]))
    process, handle = (int(value) for value in told[layout.members[0]])
    memory = map_file(process, handle, size)
    pin(memory)
    channel.barrier()  # the first one keeps the file open until all have mapped it
    return memory
