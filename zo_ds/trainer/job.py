"""A job put together from a recipe: everything that can be refused is refused before the model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_ds.config.deepspeed import block, read_deepspeed, resolve_deepspeed
from zo_ds.config.schema import ZOConfig
from zo_ds.data.batches import BatchSampler
from zo_ds.data.examples import Example, Splits, examples_sha256
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.first_order import FirstOrderEngine
from zo_ds.engine.open_first_order import check_first_order
from zo_ds.errors import ConfigError
from zo_ds.models.adapters import load_adapted
from zo_ds.models.load import LoadedModel
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.grid import Grid
from zo_ds.tasks.ask import Asking, make_asking
from zo_ds.tasks.registry import TEMPLATES, resolve_task
from zo_ds.tasks.scorer import Scorer
from zo_ds.tasks.splits import load_splits
from zo_ds.tasks.task import Task
from zo_ds.trainer.report import log

SETTLING_EXAMPLES = 4
_DTYPE_BLOCKS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Plan:
    """A recipe that has been checked against its data and the number of ranks, before any model is loaded."""

    config: ZOConfig
    deepspeed: dict[str, Any]
    task: Task
    splits: Splits

    def fingerprint(self) -> str:
        """SHA-256 of everything ranks must have in common beside the weights."""
        tree = self.config.model_dump(
            mode="json", exclude={"output": True, "resume": True, "model": {"path"}, "data": {"path"}}
        )
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
        digest.update(examples_sha256(self.splits.all()).encode())
        return digest.hexdigest()

    def data_sha256(self) -> str:
        """SHA-256 of the training examples, in order."""
        return examples_sha256(self.splits.train)

    def resolved(self, threads: int, run_dir: Path) -> dict[str, Any]:
        """Every setting as used, as plain data that `load_config` reads again."""
        tree = self.config.model_dump(mode="json")
        if self.task.name in TEMPLATES:
            tree["task"].update(template=self.task.template, label_words=list(self.task.label_words))
        tree["zeroth_order"]["total_steps"] = self.config.zeroth_order.total_steps or self.config.training.steps
        tree["parallel"]["threads"] = threads
        tree["output"]["run_dir"] = str(run_dir)
        tree["deepspeed"] = {"zero_optimization": self.deepspeed["zero_optimization"]} | {
            key: value for key, value in self.deepspeed.items() if not key.startswith(("train_", "gradient_acc"))
        }
        return tree


def check(config: ZOConfig, channel: Channel) -> Plan:
    """Check a recipe against its data and the number of ranks.

    Raises:
        ConfigError, DataError: it is refused.
    """
    tree = read_deepspeed(config.deepspeed)
    for key, dtype in _DTYPE_BLOCKS.items():
        if block(tree, key, "deepspeed").get("enabled") is True and config.model.dtype != dtype:
            raise ConfigError(
                f"DeepSpeed's '{key}' contradicts model.dtype, which is {config.model.dtype}",
                where=f"deepspeed.{key}.enabled",
                remedy=f'set model.dtype to {dtype}, or {key}.enabled to false or "auto"',
            )
    training = config.training
    if config.method == "first_order":
        check_first_order(tree, config.parallel)
    deepspeed = resolve_deepspeed(
        tree,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        world_size=channel.world_size,
    )
    task = resolve_task(config.task, config.data)
    splits = load_splits(config.data, task)
    if config.method in ("zeroth_order", "first_order"):
        make_sampler(config, task, splits, None)
    return Plan(config, deepspeed, task, splits)


def make_sampler(config: ZOConfig, task: Task, splits: Splits, scorer: Scorer | None) -> BatchSampler:
    """What draws the batches; without a scorer there are no lengths to group by.

    Raises:
        ConfigError: the batch cannot be balanced.
    """
    grouped = scorer if config.data.group_by_length else None
    return BatchSampler(
        [example.label for example in splits.train],
        config.training.batch_size,
        config.data.seed,
        balanced=config.data.balanced and bool(task.label_words),
        lengths=[grouped.length(example) for example in splits.train] if grouped else None,
    )


def load(plan: Plan) -> tuple[LoadedModel, Asking]:
    """The model of a plan, and how it is asked.

    Raises:
        ConfigError, DataError: the model cannot be loaded, or cannot be asked this way.
    """
    loaded = load_adapted(plan.config.model, plan.config.peft, plan.task.classes)
    limit = min(loaded.max_tokens, plan.config.data.max_length or loaded.max_tokens)
    return loaded, make_asking(plan.task, plan.config.task, loaded.head, loaded.tokenizer, limit)


def settle(engine: ZOEngine | FirstOrderEngine, asking: Asking, plan: Plan) -> None:
    """Let the scorers find out, on a few examples at the base weights, whether this model takes packed rows."""
    examples = plan.splits.train[:SETTLING_EXAMPLES]
    for scorer in dict.fromkeys((asking.learner, asking.judge)):
        scorer.settle(engine.module, engine.call, examples, engine.device, lockstep=engine.layout.lockstep)
    packed = asking.learner.packing is not None
    log.info("%s", f"sequences are {'packed where that saves padding' if packed else 'padded'}")


def encode_units(
    examples: Sequence[Example], micro_batch_size: int, scorer: Scorer, grid: Grid, device: torch.device
) -> list[Any]:
    """The micro-batches of a step that this rank computes, on its device."""
    mine = grid.units(len(examples) // micro_batch_size)
    return [scorer.encode(examples[u * micro_batch_size : (u + 1) * micro_batch_size]).to(device) for u in mine]


def truncation_note(asking: Asking, splits: Splits) -> str:
    """How many texts are cut to the limit, over all splits; empty if none is."""
    for scorer, examples in ((asking.learner, splits.train), (asking.judge, [*splits.dev, *splits.test])):
        for example in examples:
            scorer.length(example)
    cut = sum(scorer.prompts.truncated for scorer in dict.fromkeys((asking.learner, asking.judge)))
    return f"{cut} of {len(splits.all())} texts are longer than the model's limit and are cut" if cut else ""
