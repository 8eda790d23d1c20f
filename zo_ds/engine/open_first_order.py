"""From a model and a recipe to a first-order engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from zo_ds.config.deepspeed import block, read_deepspeed, resolve_deepspeed
from zo_ds.config.schema import ParallelConfig, ZOConfig
from zo_ds.engine.first_order import FirstOrderEngine
from zo_ds.engine.gradients import Differentiator, make_optimizer
from zo_ds.errors import ConfigError
from zo_ds.forward.evaluator import LossFunction
from zo_ds.forward.loss import model_loss
from zo_ds.forward.perturber import Perturber
from zo_ds.maths.directions import NoiseStructure
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.grid import make_grid
from zo_ds.parallel.launched import open_channel
from zo_ds.parallel.layout import Kind, Layout
from zo_ds.parallel.world import enter_world
from zo_ds.stores.base import materialise, trainable_parameters
from zo_ds.stores.resident import ResidentStore
from zo_ds.tensor_files import Source

_INSTEAD = {
    "optimizer": "first_order.optimizer and its constants",
    "scheduler": "first_order.lr_schedule, warmup_steps and final_ratio",
    "gradient_clipping": "first_order.max_grad_norm",
}


def initialize_first_order(
    model: nn.Module,
    config: ZOConfig,
    *,
    loss_fn: LossFunction | None = None,
    channel: Channel | None = None,
    weights: Source | None = None,
) -> FirstOrderEngine:
    """Hand a model and an optimizer to DeepSpeed and get a first-order engine for it; collective.

    Every rank holds all weights, gradients and optimizer states, and takes its share of the micro-batches. A bfloat16
    model is trained as is usual: weights, gradients and optimizer states in fp32, matrix products in bfloat16.

    Args:
        model: any module; what requires a gradient is trained. It is changed in place (evaluation mode, dtype).
        config: the recipe; `first_order`, `training`, `parallel` and `deepspeed` are read.
        loss_fn: (model, batch) -> per-example losses or a scalar, differentiable; the model's own ``.loss`` if None.
        channel: to the other ranks; opened from the launcher's environment if None.
        weights: fills parameters that are on the meta device, see `zo_ds.models.load.load_model`.

    Raises:
        ConfigError: ZeRO or a layout that shards, ranks for directions, an optimizer in DeepSpeed's configuration, or a
            float16 model.
        MachineError, PeerError: the ranks cannot be joined.
    """
    training, parallel = config.training, config.parallel
    tree = read_deepspeed(config.deepspeed)
    check_first_order(tree, parallel)
    autocast = products(model)
    channel = channel or open_channel(parallel.timeout_s, parallel.channel)
    told = resolve_deepspeed(
        tree,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        world_size=channel.world_size,
    )
    grid = make_grid(
        channel.rank,
        channel.world_size,
        population=1,
        data=None if parallel.data == "auto" else parallel.data,
        units=training.batch_size // training.micro_batch_size,
        places=1,
        chunk=1,
    )
    # Gradients are added up in DeepSpeed's world, which has to be all ranks, as that of one shard group is.
    enter_world(
        Layout(Kind.SHARD_GROUP, channel.rank, channel.world_size, channel.world_size), channel, parallel.timeout_s
    )
    store = _hold(model, weights)
    engine = _hand_over(store, config, told, channel)
    perturber = Perturber(model, store.parameters, store.structure)
    evaluator = Differentiator(model, perturber, loss_fn or model_loss, autocast, torch.device(engine.device).type)
    return FirstOrderEngine(config.first_order, training.steps, store, evaluator, channel, engine, grid)


def check_first_order(tree: Mapping[str, Any], parallel: ParallelConfig) -> None:
    """Refuse what a first-order run cannot use.

    Args:
        tree: the DeepSpeed configuration.
        parallel: the recipe's.

    Raises:
        ConfigError: naming the key.
    """
    for key, instead in _INSTEAD.items():
        if tree.get(key) not in (None, {}, 0, 0.0, False, "auto"):
            raise ConfigError(
                f"DeepSpeed's '{key}' cannot be used here",
                where=f"deepspeed.{key}",
                why="the recipe says how a first-order run is trained",
                remedy=f"remove it and set {instead}",
            )
    stage = block(tree, "zero_optimization", "deepspeed").get("stage", 0)
    if stage in (1, 2, 3):
        raise ConfigError(
            f"ZeRO stage {stage} is refused for first-order runs",
            where="deepspeed.zero_optimization.stage",
            why="they are baselines, whose memory is that of whole weights, gradients and optimizer states",
            remedy="set it to 0",
        )
    if parallel.layout not in ("auto", "solo"):
        raise ConfigError(
            f"the layout {parallel.layout} cannot be used by first-order runs",
            where="parallel.layout",
            why="every rank holds whole weights and whole gradients",
            remedy="set it to auto or solo",
        )
    if parallel.population not in ("auto", 1):
        raise ConfigError(
            "a first-order run has no directions to share out",
            where=f"parallel.population={parallel.population}",
            remedy="set it to auto; ranks share out the micro-batches",
        )


def products(model: nn.Module) -> torch.dtype | None:
    """The dtype of matrix products if it is not that of the weights.

    Raises:
        ConfigError: gradients would vanish in the model's dtype.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if torch.float16 in dtypes:
        raise ConfigError(
            "a float16 model cannot be trained with gradients",
            where="model.dtype",
            why="small gradients vanish in float16 unless losses are scaled, which would skip steps",
            remedy="set model.dtype to bfloat16 or float32",
        )
    return torch.bfloat16 if torch.bfloat16 in dtypes else None


def _hold(model: nn.Module, weights: Source | None) -> ResidentStore:
    """Put the model on the device, what is trained in fp32; values are those of the model's own dtype."""
    device = torch.device(get_accelerator().current_device_name())
    rounded = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() >= 2 and parameter.dtype == torch.bfloat16
    }
    for name, parameter in model.named_parameters():
        parameter.data = (parameter.data.float() if name in rounded else parameter.data).contiguous()
    materialise(model, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=device))
    model.to(device)
    store = ResidentStore(model, trainable_parameters(model), NoiseStructure.DENSE)
    if weights is not None:
        store.fill(weights)
    for name, parameter in model.named_parameters():
        if name in rounded:
            parameter.data.copy_(parameter.data.to(rounded[name]))
    return store


def _hand_over(
    store: ResidentStore, config: ZOConfig, told: Mapping[str, Any], channel: Channel
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine, which adds up gradients over the ranks when a step is taken, and not before."""
    told = {
        **told,
        "managed_gradient_accumulation": False,
        # Without the key DeepSpeed cuts gradients to a length of 1.
        "gradient_clipping": config.first_order.max_grad_norm or 0.0,
    }
    optimizer = make_optimizer(config.first_order, store.parameters)
    engine, *_ = deepspeed.initialize(model=store.module, optimizer=optimizer, config=told)
    # Alone it would still copy all gradients into a buffer to send them from.
    engine.enable_backward_allreduce = channel.world_size > 1
    engine.eval()
    return engine
