"""`zo_ds.initialize`: from a model and a configuration to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from zo_ds.config.deepspeed import block, read_deepspeed, resolve_deepspeed
from zo_ds.config.load import validate
from zo_ds.config.schema import ParallelConfig, ZerothOrderConfig, ZOConfig
from zo_ds.engine.engine import ZOEngine, decays
from zo_ds.engine.measure import Measurement
from zo_ds.engine.open_store import open_store
from zo_ds.engine.resume import Options, open_own_run
from zo_ds.errors import ConfigError
from zo_ds.forward.batched import BatchedEvaluator
from zo_ds.forward.evaluator import Evaluator, LossFunction
from zo_ds.forward.joining import STRICT_REPLICAS, PassSize
from zo_ds.forward.loss import model_loss
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.maths.estimators import probes
from zo_ds.maths.lr_rule import UNKNOWN_STEPS, default_lr
from zo_ds.maths.names import is_adapted
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.grid import Grid, make_grid
from zo_ds.parallel.launched import open_channel
from zo_ds.parallel.layout import Kind, Layout, choose_layout
from zo_ds.parallel.world import enter_world
from zo_ds.planning.placement import Placement
from zo_ds.stores.base import WeightStore
from zo_ds.tensor_files import Source

_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}


def initialize(
    model: nn.Module,
    config: ZOConfig | Mapping[str, Any] | str | Path,
    *,
    loss_fn: LossFunction | None = None,
    channel: Channel | None = None,
    run_dir: str | Path | None = None,
    parallel: ParallelConfig | Mapping[str, Any] | None = None,
    weights: Source | None = None,
    placement: Placement | None = None,
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
        parallel: the settings of a recipe's `parallel` section, if config is not a `ZOConfig`.
        weights: fills parameters that are on the meta device, see `zo_ds.models.load.load_model`.
        placement: what stays on the device and how far ahead the rest is fetched, where the configuration does not say
            so; see `zo_ds.planning.budget.plan`.

    Raises:
        ConfigError: the configuration is refused, or is not that of the run in run_dir.
        CorruptRunError: the run in run_dir started from other weights, or cannot be read.
        MachineError, PeerError: the ranks cannot be joined, or run_dir cannot be written.
    """
    asked = _split(config, parallel)
    zeroth_order = asked.zeroth_order
    if decays(zeroth_order) and zeroth_order.total_steps is None:
        raise ConfigError(
            "a decaying schedule needs the length of the run",
            where="zeroth_order.total_steps",
            remedy="set zeroth_order.total_steps, or the schedules to constant",
        )
    _cast(model, asked.deepspeed)
    channel = channel or open_channel(asked.parallel.timeout_s, asked.parallel.channel)
    resolved = resolve_deepspeed(
        asked.deepspeed,
        batch_size=asked.batch,
        micro_batch_size=asked.micro_batch,
        world_size=channel.world_size,
        chosen=None if placement is None else placement.settings(),
    )
    chunk = STRICT_REPLICAS if zeroth_order.strict and zeroth_order.forward == "batched" else 1
    grid = _grid(asked, channel, chunk)
    layout = _layout(model, resolved, asked.parallel, channel)
    enter_world(layout, channel, asked.parallel.timeout_s)
    resident = frozenset(() if placement is None else placement.resident_parameters)
    store, engine = open_store(model, resolved, zeroth_order.noise, layout, channel, weights, resident)
    perturber = Perturber(model, store.parameters, store.structure)
    device_type = torch.device(engine.device).type
    evaluator = _evaluator(zeroth_order, perturber, store, loss_fn or model_loss, device_type)
    measurement = Measurement(evaluator, channel, grid, layout, chunk)
    made = ZOEngine(zeroth_order, store, evaluator, channel, engine, measurement)
    if not isinstance(zeroth_order.lr, float):
        # A range test needs batches, and comes later.
        made.take_lr({"value": _lr_by_rule(zeroth_order, store), "how": "rule"})
    if run_dir is not None:
        open_own_run(made, Path(run_dir), Options(total_steps=zeroth_order.total_steps))
    return made


def _lr_by_rule(config: ZerothOrderConfig, store: WeightStore) -> float:
    return default_lr(config.estimator_spec, store.trained, store.total, config.total_steps or UNKNOWN_STEPS)


def _grid(asked: _Asked, channel: Channel, chunk: int) -> Grid:
    parallel = asked.parallel
    return make_grid(
        channel.rank,
        channel.world_size,
        population=None if parallel.population == "auto" else parallel.population,
        data=None if parallel.data == "auto" else parallel.data,
        units=None if asked.batch is None or asked.micro_batch is None else asked.batch // asked.micro_batch,
        places=len(probes(asked.zeroth_order.estimator_spec)),
        chunk=chunk,
    )


def _layout(model: nn.Module, resolved: Mapping[str, Any], parallel: ParallelConfig, channel: Channel) -> Layout:
    zero = resolved["zero_optimization"]
    device = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return choose_layout(
        channel,
        None if parallel.layout == "auto" else Kind(parallel.layout),
        None if parallel.shard_size == "auto" else parallel.shard_size,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        stage=zero["stage"],
        offload=(zero.get("offload_param") or {}).get("device", "none"),
        free_bytes=psutil.virtual_memory().available,
        device_bytes=device,
    )


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


@dataclass(frozen=True)
class _Asked:
    """What a user's configuration asks for; sizes are None where it does not tell."""

    zeroth_order: ZerothOrderConfig
    deepspeed: dict[str, Any]
    parallel: ParallelConfig
    batch: int | None = None
    micro_batch: int | None = None


def _split(
    config: ZOConfig | Mapping[str, Any] | str | Path, parallel: ParallelConfig | Mapping[str, Any] | None
) -> _Asked:
    if isinstance(config, ZOConfig):
        zeroth_order = config.zeroth_order
        if zeroth_order.total_steps is None:
            zeroth_order = zeroth_order.model_copy(update={"total_steps": config.training.steps})
        sizes = (config.training.batch_size, config.training.micro_batch_size)
        return _Asked(zeroth_order, read_deepspeed(config.deepspeed), config.parallel, *sizes)
    tree = read_deepspeed(config)
    where = str(config) if isinstance(config, (str, Path)) else "config"
    if "zeroth_order" not in tree:
        raise ConfigError(
            "the DeepSpeed configuration has no 'zeroth_order' block",
            where=where,
            remedy='add one, for example "zeroth_order": {"estimator": "fzoo", "lr": 1e-4}',
        )
    zeroth_order = validate(ZerothOrderConfig, tree["zeroth_order"], where=f"{where}: zeroth_order")
    if not isinstance(parallel, ParallelConfig):
        parallel = validate(ParallelConfig, parallel or {}, where="parallel")
    return _Asked(zeroth_order, tree, parallel)


def _cast(model: nn.Module, tree: Mapping[str, Any]) -> None:
    for key, dtype in _DTYPES.items():
        if block(tree, key, "deepspeed").get("enabled") is True:
            for parameter in model.parameters():
                # An adapter's matrices are small, and stay as wide as peft makes them.
                held = is_adapted(model) and parameter.requires_grad
                if parameter.is_floating_point() and parameter.dim() >= 2 and not held:
                    parameter.data = parameter.data.to(dtype)
