"""The plan of a run on a GPU: what stays there, how far ahead the rest is fetched, what a step should take."""

from __future__ import annotations

from dataclasses import replace

import torch

from zo_ds.errors import ConfigError
from zo_ds.models.load import LoadedModel
from zo_ds.parallel.channel import Channel
from zo_ds.planning.budget import plan as plan_step
from zo_ds.planning.hardware import measure
from zo_ds.planning.placement import Placement
from zo_ds.planning.shapes import ModelShapes
from zo_ds.tasks.scorer import Scorer
from zo_ds.trainer.job import Plan
from zo_ds.trainer.report import log


def place(plan: Plan, loaded: LoadedModel, scorer: Scorer, channel: Channel) -> Placement | None:
    """Plan a run whose weights are offloaded from a GPU; None if there is nothing to be planned.

    On a processor, the device's memory is the host's: what is "fetched" is only looked at, and nothing can be kept.

    Args:
        plan: of the job.
        loaded: its model.
        scorer: tells how long examples are.
        channel: to the other ranks.

    Raises:
        ConfigError: it does not fit into `parallel.gpu_budget_gib`.
    """
    zero, config = plan.deepspeed["zero_optimization"], plan.config
    offload = (zero.get("offload_param") or {}).get("device", "none")
    if not torch.cuda.is_available() or offload == "none" or config.parallel.layout == "shard_group":
        return None
    training, zeroth_order, asked = config.training, config.zeroth_order, config.parallel.gpu_budget_gib
    replicas = zeroth_order.replicas_per_pass
    try:
        return plan_step(
            ModelShapes.of(loaded.module),
            replace(measure(getattr(torch, config.model.dtype)), ranks=channel.local_world_size),
            num_directions=zeroth_order.num_directions,
            examples=training.micro_batch_size,
            tokens=max(map(scorer.length, plan.splits.train)),
            dtype_bytes=getattr(torch, config.model.dtype).itemsize,
            offload=offload,
            device_budget_bytes=None if asked == "auto" else int(asked * 2**30),
            replicas_per_pass=None if replicas == "auto" else replicas,
            activation_budget_bytes=zeroth_order.activation_budget_mib * 2**20,
            micro_batches=-(-training.batch_size // training.micro_batch_size // channel.world_size),
            noise=zeroth_order.noise,
        )
    except ConfigError as error:
        if asked != "auto":
            raise
        # A plan is an estimate: it must not refuse what may work.
        log.warning("%s", f"no plan, nothing is prefetched or kept on the GPU: {error.what} ({error.why})")
        return None
