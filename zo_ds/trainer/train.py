"""`zo_ds train`: open or continue a run directory, load the model, hand over to the method that the recipe names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import zo_ds
from zo_ds.config.schema import ZOConfig
from zo_ds.errors import ZODSError
from zo_ds.ops.builder import Report
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.launched import launched, open_channel
from zo_ds.trainer.baselines import in_context, linear_probe, zero_shot
from zo_ds.trainer.environment import describe, op_reports, use_threads
from zo_ds.trainer.first_order import first_order
from zo_ds.trainer.job import Plan, check, load, truncation_note
from zo_ds.trainer.opening import Opening, open_run_dir
from zo_ds.trainer.refusals import refuse
from zo_ds.trainer.report import log, start_logging
from zo_ds.trainer.run import Run
from zo_ds.trainer.zeroth_order import zeroth_order

METHODS = {
    "zeroth_order": zeroth_order,
    "first_order": first_order,
    "zero_shot": zero_shot,
    "in_context": in_context,
    "linear_probe": linear_probe,
}
"""What `method` in a recipe means; each gives what result.json holds."""


def train(config: ZOConfig, given: str, overrides: list[str]) -> Path | None:
    """Run a recipe on this rank, or go on with it where an earlier process stopped.

    Args:
        config: the recipe.
        given: text of the recipe's file, kept with the run.
        overrides: from the command line, kept with the run.

    Returns:
        The run directory on rank 0, None on the others.

    Raises:
        ZODSError: see the subclasses; the run directory's log has the same message.
    """
    started = time.perf_counter()
    # Before DeepSpeed's world sets the variables itself.
    by_launcher = launched()
    channel = open_channel(config.parallel.timeout_s, config.parallel.channel)
    threads = use_threads(config.parallel.threads, channel.local_world_size)
    start_logging(channel.rank)
    compiled = op_reports()
    plan = check(config, channel)
    run_dir, opening = open_run_dir(plan, threads, channel)
    try:
        if opening.finished:
            log.info("%s", f"the run in {opening.path} is finished; output.run_dir=... or resume=never for another one")
            return opening.path if channel.rank == 0 else None
        try:
            loaded, asking = load(plan)
            refuse(plan, loaded)
        except ZODSError:
            if run_dir is not None and opening.fresh:
                run_dir.discard()
                run_dir = None
            raise
        start_logging(channel.rank, opening.path)
        _announce(plan, channel, threads, opening, compiled)

        def explain() -> None:
            if run_dir is not None:
                run_dir.explain(given, overrides, plan.resolved(threads, opening.path), plan.deepspeed)
                run_dir.write_json("env.json", describe(channel.world_size, threads))

        if run_dir is not None:
            run_dir.retire_result()
            run_dir.write("state.json", opening.state.to_json())
        if not opening.forked:
            explain()
        run = Run(plan, loaded, asking, channel, run_dir, opening, by_launcher, started, explain)
        try:
            _introduce(run)
            result = METHODS[config.method](run)
            if run_dir is not None:
                run_dir.write_json("result.json", result)
        except Exception as error:
            log.error("%s", error)
            raise
    finally:
        if run_dir is not None:
            run_dir.close()
    return opening.path if channel.rank == 0 else None


def _announce(plan: Plan, channel: Channel, threads: int, opening: Opening, compiled: Sequence[Report]) -> None:
    log.info(
        "%s",
        f"zo_ds {zo_ds.__version__}: {_what(plan.config)}, {channel.world_size} rank(s) x {threads} thread(s), "
        f"ZeRO stage {plan.deepspeed['zero_optimization']['stage']}, "
        f"ops {', '.join(f'{op.name} {op.active}' for op in compiled if op.active != '-')}",
    )
    log.info("%s", f"run directory {opening.path}{'' if opening.fresh else ' (going on)'}")


def _what(config: ZOConfig) -> str:
    steps = f"{config.training.steps} steps of {config.training.batch_size}"
    if config.method == "zeroth_order":
        zo = config.zeroth_order
        lr = zo.lr if isinstance(zo.lr, str) else f"{zo.lr:g}"
        return f"{zo.estimator.value}, N = {zo.num_directions}, eps {zo.eps:g}, lr {lr}, {steps}"
    if config.method == "first_order":
        return f"{config.first_order.optimizer}, lr {config.first_order.lr:g}, {steps}"
    return config.method.replace("_", " ")


def _introduce(run: Run) -> None:
    config, splits = run.plan.config, run.plan.splits
    parameters = list(run.loaded.module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    share = "" if trained == total else f", {trained:,} of them trained ({config.peft.method})"
    log.info(
        "%s",
        f"model {config.model.path} ({total / 1e6:.1f} M parameters{share}, {config.model.dtype}, {run.loaded.head}), "
        f"data {config.data.path} ({len(splits.train)} train, {len(splits.dev)} dev, {len(splits.test)} test), "
        f"task {run.plan.task.name}, objective {run.plan.task.objective.value}",
    )
    note = truncation_note(run.asking, splits)
    if note:
        log.warning("%s", note)
