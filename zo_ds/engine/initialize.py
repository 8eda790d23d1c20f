"""`zo_ds.initialize`: from a model and a configuration to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from zo_ds.config.deepspeed import block, read_deepspeed, resolve_deepspeed, without_nvme
from zo_ds.config.load import validate
from zo_ds.config.schema import ZerothOrderConfig, ZOConfig
from zo_ds.engine.engine import ZOEngine, decays
from zo_ds.engine.resume import Options, open_own_run
from zo_ds.errors import ConfigError
from zo_ds.forward.batched import BatchedEvaluator
from zo_ds.forward.evaluator import Evaluator, LossFunction
from zo_ds.forward.joining import PassSize
from zo_ds.forward.loss import model_loss
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.parallel.channel import Channel, open_channel
from zo_ds.parallel.world import enter_world_of_one
from zo_ds.stores.base import WeightStore, trainable_parameters
from zo_ds.stores.resident import ResidentStore
from zo_ds.stores.zero3 import Zero3Store, move_to_disk, partition

DEFAULT_TIMEOUT_S = 600.0
_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}


def initialize(
    model: nn.Module,
    config: ZOConfig | Mapping[str, Any] | str | Path,
    *,
    loss_fn: LossFunction | None = None,
    channel: Channel | None = None,
    run_dir: str | Path | None = None,
) -> ZOEngine:
    """Hand a model to DeepSpeed and get a zeroth-order engine for it.

    Args:
        model: any module; what requires a gradient is trained. It is changed in place (evaluation mode, dtype,
            sharding).
        config: a DeepSpeed configuration (mapping or path of the JSON) with a ``zeroth_order`` block, or a `ZOConfig`.
            ``bf16`` / ``fp16`` in it choose the dtype of the matrices.
        loss_fn: (model, batch) -> per-example losses or a scalar, differentiable or not; the model's own ``.loss``
            if None.
        channel: to the other ranks; opened from the launcher's environment if None.
        run_dir: journal every step there; if it holds a run of this model, go on with it: `engine.steps_done` tells
            from where. None: no journal, unless `zo_ds.engine.resume.open_run` is called.

    Raises:
        ConfigError: the configuration is refused, or is not that of the run in run_dir.
        CorruptRunError: the run in run_dir started from other weights, or cannot be read.
        MachineError, PeerError: the ranks cannot be joined, or run_dir cannot be written.
    """
    zeroth_order, tree, sizes, timeout = _split(config)
    if decays(zeroth_order) and zeroth_order.total_steps is None:
        raise ConfigError(
            "a decaying schedule needs the length of the run",
            where="zeroth_order.total_steps",
            remedy="set zeroth_order.total_steps, or the schedules to constant",
        )
    _cast(model, tree)
    channel = channel or open_channel(timeout)
    resolved = resolve_deepspeed(tree, batch_size=sizes[0], micro_batch_size=sizes[1], world_size=channel.world_size)
    enter_world_of_one()
    store, engine = _open_store(model, resolved, zeroth_order)
    perturber = Perturber(model, store.parameters, store.structure)
    device_type = torch.device(engine.device).type
    evaluator = _evaluator(zeroth_order, perturber, store, loss_fn or model_loss, device_type)
    made = ZOEngine(zeroth_order, store, evaluator, channel, engine)
    if run_dir is not None:
        open_own_run(made, Path(run_dir), Options(total_steps=zeroth_order.total_steps))
    return made


def _evaluator(
    config: ZerothOrderConfig, perturber: Perturber, store: WeightStore, loss_fn: LossFunction, device_type: str
) -> Evaluator:
    model = store.module
    half = {p.dtype for p in model.parameters()} & set(_DTYPES.values())
    autocast_dtype = next(iter(half), None)
    sequential = SequentialEvaluator(model, perturber, loss_fn, autocast_dtype, device_type)
    if config.forward == "sequential":
        return sequential
    replicas = None if config.replicas_per_pass == "auto" else config.replicas_per_pass
    size = PassSize(replicas, config.activation_budget_mib * 2**20, config.strict)
    return BatchedEvaluator(sequential, pass_size=size, gathered=store.gathered)


def _split(
    config: ZOConfig | Mapping[str, Any] | str | Path,
) -> tuple[ZerothOrderConfig, dict[str, Any], tuple[int | None, int | None], float]:
    if isinstance(config, ZOConfig):
        sizes = (config.training.batch_size, config.training.micro_batch_size)
        zeroth_order = config.zeroth_order
        if zeroth_order.total_steps is None:
            zeroth_order = zeroth_order.model_copy(update={"total_steps": config.training.steps})
        return zeroth_order, read_deepspeed(config.deepspeed), sizes, config.parallel.timeout_s
    tree = read_deepspeed(config)
    where = str(config) if isinstance(config, (str, Path)) else "config"
    if "zeroth_order" not in tree:
        raise ConfigError(
            "the DeepSpeed configuration has no 'zeroth_order' block",
            where=where,
            remedy='add one, for example "zeroth_order": {"estimator": "fzoo", "lr": 1e-4}',
        )
    zeroth_order = validate(ZerothOrderConfig, tree["zeroth_order"], where=f"{where}: zeroth_order")
    return zeroth_order, tree, (None, None), DEFAULT_TIMEOUT_S


def _cast(model: nn.Module, tree: Mapping[str, Any]) -> None:
    for key, dtype in _DTYPES.items():
        if block(tree, key, "deepspeed").get("enabled") is True:
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.dim() >= 2:
                    parameter.data = parameter.data.to(dtype)


def _open_store(
    model: nn.Module, resolved: dict[str, Any], config: ZerothOrderConfig
) -> tuple[WeightStore, deepspeed.DeepSpeedEngine]:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                "DeepSpeed cannot hold a parameter without dimensions", where=name, remedy="give it the shape [1]"
            )
        parameter.data = parameter.data.contiguous()
    parameters = trainable_parameters(model)
    told, disk = without_nvme(resolved)
    sharded = told["zero_optimization"]["stage"] == 3
    if sharded:
        partition(model, told)
    engine, *_ = deepspeed.initialize(model=model, config=told)
    if disk is not None:
        move_to_disk(model.parameters(), disk)
    # They pass every input through autograd, which no forward here needs and which changes what a module sees:
    # `query is key` no longer holds, and attention takes another kernel than with resident weights.
    for hook in getattr(engine.optimizer, "backward_hooks", []):
        hook.remove()
    engine.eval()
    if sharded:
        return Zero3Store(model, parameters, config.noise), engine
    return ResidentStore(model, parameters, config.noise), engine
