"""What DeepSpeed gets to see: the user's JSON with every "auto" resolved and everything that cannot work refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_ds.errors import ConfigError

_REFUSED = {
    "optimizer": "a zeroth-order step has no gradients for an optimizer to consume",
    "scheduler": "the learning rate of a zeroth-order step is scheduled by zo_ds, so that it can be replayed",
    "gradient_clipping": "there are no gradients to clip",
    "prescale_gradients": "there are no gradients to scale",
}
# Without a plan nothing is prefetched; max_live_parameters is what bounds gathered weights.
_ZERO3_AUTO: dict[str, Any] = {
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "reduce_bucket_size": 500_000_000,
}


def read_deepspeed(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration as plain data; a copy if it was given inline.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    try:
        tree = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the DeepSpeed configuration: {error.strerror}",
            where=str(source),
            remedy="'deepspeed' takes the path of a JSON file (relative to the recipe) or the same inline",
        ) from error
    except ValueError as error:
        raise ConfigError(f"the DeepSpeed configuration is not JSON: {error}", where=str(source)) from error
    if not isinstance(tree, dict):
        raise ConfigError("a DeepSpeed configuration is a JSON object", where=str(source))
    return tree


def resolve_deepspeed(
    tree: Mapping[str, Any],
    *,
    batch_size: int | None,
    micro_batch_size: int | None,
    world_size: int,
    chosen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration that DeepSpeed is started with, in a world of one for each rank.

    Args:
        tree: as the user gave it, with or without "auto" values.
        batch_size: examples a step over all ranks; None: not known before the first step.
        micro_batch_size: examples in one forward pass; None: take the JSON's, or 1.
        world_size: ranks of the job.
        chosen: what stands for "auto" and for missing keys of ``zero_optimization``, instead of the defaults.

    Returns:
        Plain data without "auto". Batch sizes are those of one rank, whatever DeepSpeed's world is.

    Raises:
        ConfigError: ZeRO stage 1 or 2, an optimizer, sizes that contradict the recipe, an "auto"
            that zo_ds cannot resolve.
    """
    config = {key: value for key, value in copy.deepcopy(dict(tree)).items() if key != "zeroth_order"}
    for key, why in _REFUSED.items():
        if config.get(key) not in (None, {}, 0, 0.0, False, "auto"):
            raise ConfigError(
                f"DeepSpeed's '{key}' cannot be used here", where=f"deepspeed.{key}", why=why, remedy="remove it"
            )
        config.pop(key, None)
    _resolve_batch(config, batch_size, micro_batch_size, world_size)
    # zo_ds casts the matrices itself and keeps vectors in fp32; DeepSpeed would cast both.
    for key in ("bf16", "fp16", "bfloat16"):
        config.pop(key, None)
    config["zero_optimization"] = _resolve_zero(block(config, "zero_optimization", "deepspeed"), chosen or {})
    left = [path for path, value in _leaves(config, "deepspeed") if value == "auto"]
    if left:
        raise ConfigError(
            f"'auto' is not resolved for: {', '.join(left)}",
            where=left[0],
            why="DeepSpeed drops such a key silently and uses its own default",
            remedy="give a value or remove the key",
        )
    return config


def block(tree: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    """The mapping under a key, empty if there is none.

    Args:
        tree: part of a DeepSpeed configuration.
        key: whose value is wanted.
        path: of the tree, for messages.

    Raises:
        ConfigError: a plain value stands where a block belongs.
    """
    value = tree.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"'{key}' is a block of settings, got {value!r}",
            where=f"{path}.{key}",
            remedy="write it as in DeepSpeed's documentation, or remove it",
        )
    return value


def _resolve_batch(config: dict[str, Any], batch: int | None, micro: int | None, world_size: int) -> None:
    given_micro = _number(config, "train_micro_batch_size_per_gpu")
    given_batch = _number(config, "train_batch_size")
    _agree("deepspeed.train_micro_batch_size_per_gpu", given_micro, "training.micro_batch_size", micro)
    _agree("deepspeed.train_batch_size", given_batch, "training.batch_size", batch)
    micro = micro or given_micro or 1
    batch = batch or given_batch or micro * world_size
    if batch % micro:
        raise ConfigError(
            f"a batch of {batch} cannot be made of units of {micro}",
            where="deepspeed.train_batch_size",
            why="every unit of work must have the same shape",
            remedy=f"make it a multiple of {micro}, or choose another train_micro_batch_size_per_gpu",
        )
    # Ranks may take unequal numbers of units; DeepSpeed is told the most that one takes.
    most = -(-batch // (micro * world_size))
    _agree(
        "deepspeed.gradient_accumulation_steps",
        _number(config, "gradient_accumulation_steps"),
        "units of work of a rank",
        most,
    )
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = most


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value in (None, "auto"):
        return None
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"'{key}' must be a positive integer or \"auto\", got {value!r}", where=f"deepspeed.{key}")
    return value


def _agree(key: str, given: int | None, other: str, wanted: int | None) -> None:
    if given is not None and wanted is not None and given != wanted:
        raise ConfigError(
            f"{given} contradicts {other}, which is {wanted}", where=key, remedy='write "auto" here, or make them equal'
        )


def _resolve_zero(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    zero = dict(given)
    stage = zero.get("stage", 0)
    if stage in (1, 2):
        raise ConfigError(
            f"ZeRO stage {stage} is refused",
            where="deepspeed.zero_optimization.stage",
            why="it shards optimizer states and gradients, and a forward-only run has neither",
            remedy="use stage 0 (weights resident on every rank) or stage 3 (weights sharded or offloaded)",
        )
    if stage not in (0, 3):
        raise ConfigError(
            f"there is no ZeRO stage {stage!r}", where="deepspeed.zero_optimization.stage", remedy="use 0 or 3"
        )
    if stage == 0:
        if zero.get("offload_param"):
            raise ConfigError(
                "offload_param needs ZeRO stage 3",
                where="deepspeed.zero_optimization.offload_param",
                remedy="set zero_optimization.stage to 3",
            )
        return {"stage": 0}
    _check_offload(zero)
    if zero.get("memory_efficient_linear"):
        raise ConfigError(
            "memory_efficient_linear is refused",
            where="deepspeed.zero_optimization.memory_efficient_linear",
            why="it replaces torch.nn.functional.linear for the whole process to save gradient memory",
            remedy="remove it",
        )
    small = zero.get("stage3_param_persistence_threshold", 0)
    if small != "auto" and (isinstance(small, bool) or not isinstance(small, (int, float)) or small < 0):
        raise ConfigError(
            f"stage3_param_persistence_threshold is a number of elements, got {small!r}",
            where="deepspeed.zero_optimization.stage3_param_persistence_threshold",
            remedy='write a number, or "auto"',
        )
    for key, value in {**_ZERO3_AUTO, **chosen}.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    return {**zero, "stage": 3, "memory_efficient_linear": False}


def _check_offload(zero: dict[str, Any]) -> None:
    if zero.pop("offload_optimizer", None):
        raise ConfigError(
            "offload_optimizer has nothing to offload",
            where="deepspeed.zero_optimization.offload_optimizer",
            why="a forward-only run has no optimizer states",
            remedy="remove it; offload_param moves the weights",
        )
    offload = block(zero, "offload_param", "deepspeed.zero_optimization")
    device = offload.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise ConfigError(
            f"offload_param to {device!r} is not supported",
            where="deepspeed.zero_optimization.offload_param.device",
            remedy="use cpu or nvme",
        )
    if device == "nvme" and not isinstance(offload.get("nvme_path"), str):
        raise ConfigError(
            "offload_param to nvme needs a folder",
            where="deepspeed.zero_optimization.offload_param.nvme_path",
            remedy="give the path of a folder on the disk, e.g. /local_nvme",
        )


def split_off(resolved: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None, int]:
    """What DeepSpeed is told, and what zo_ds does instead of it.

    DeepSpeed's own swapping needs a compiled aio operator and loses weights that are updated in place; zo_ds keeps
    shards in a file instead. Small parameters that DeepSpeed keeps gathered would not see the updates of their shards;
    zo_ds has their shards live on the device.

    Returns:
        (DeepSpeed's configuration, folder of the weights on disk if any, elements up to which a parameter is small).
    """
    config = copy.deepcopy(dict(resolved))
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        return config, None, 0
    small, zero["stage3_param_persistence_threshold"] = int(zero["stage3_param_persistence_threshold"]), 0
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return config, None, small
    zero["offload_param"] = {"device": "cpu"}
    return config, Path(offload["nvme_path"]), small


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}")]
    if isinstance(tree, list):
        return [leaf for index, value in enumerate(tree) for leaf in _leaves(value, f"{path}[{index}]")]
    return [(path, tree)]
