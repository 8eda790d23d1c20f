"""`zo_ds train`: open or continue a run directory, set the model up, hand over to the session."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zo_ds
from zo_ds.config.identity import Difference
from zo_ds.config.schema import ZOConfig
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.export import write_extras
from zo_ds.engine.initialize import initialize
from zo_ds.engine.resume import Options, Resumed, open_run
from zo_ds.errors import ConfigError, MachineError, PeerError, StoppedError, ZODSError
from zo_ds.models.load import LoadedModel
from zo_ds.ops.builder import Report
from zo_ds.parallel.channel import Channel, agree, on_rank_0
from zo_ds.parallel.launched import launched, open_channel
from zo_ds.tasks.scoring import Scorer
from zo_ds.trainer.environment import describe, op_reports, use_threads
from zo_ds.trainer.health import Guard, local_peers
from zo_ds.trainer.job import Plan, check, load, settle, truncation_note
from zo_ds.trainer.place import place
from zo_ds.trainer.report import Progress, log, log_name, start_logging
from zo_ds.trainer.run_dir import RunDir, changes, default_run_dir, find_unfinished, read_result, refuse_changes
from zo_ds.trainer.session import Session
from zo_ds.trainer.state import RunState


@dataclass(frozen=True)
class _Opening:
    """What rank 0 found in the run directory, told to all.

    Attributes:
        path: of the directory.
        state: of the run.
        forked: changes of the mathematics that the user wants.
        finished: there is nothing left to do.
        fresh: the run begins here.
    """

    path: Path
    state: RunState
    forked: list[str]
    finished: bool
    fresh: bool


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
    run_dir, opening = _open(plan, threads, channel)
    try:
        if opening.finished:
            log.info("%s", f"the run in {opening.path} is finished; output.run_dir=... or resume=never for another one")
            return opening.path if channel.rank == 0 else None
        try:
            loaded, scorer = load(plan)
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
        job = _Job(plan, loaded, scorer, channel, run_dir, opening, by_launcher, started, explain)
        try:
            result = _run(job)
            if run_dir is not None:
                run_dir.write_json("result.json", result)
        except Exception as error:
            log.error("%s", error)
            raise
    finally:
        if run_dir is not None:
            run_dir.close()
    return opening.path if channel.rank == 0 else None


@dataclass(frozen=True)
class _Job:
    """What a run is put together from.

    Attributes:
        launched: the parent is a launcher.
        started: when this process began, by the performance counter.
        explain: writes recipe and environment into the run directory.
    """

    plan: Plan
    loaded: LoadedModel
    scorer: Scorer
    channel: Channel
    run_dir: RunDir | None
    opening: _Opening
    launched: bool
    started: float
    explain: Callable[[], None]


def _open(plan: Plan, threads: int, channel: Channel) -> tuple[RunDir | None, _Opening]:
    """The run directory on rank 0, and what is in it, on all ranks."""

    def look() -> tuple[RunDir, dict[str, Any]]:
        path = _choose(plan, threads)
        run_dir = RunDir(path)
        try:
            state, forked, fresh = _look(run_dir, plan, plan.resolved(threads, path))
        except ZODSError:
            run_dir.close()
            raise
        return run_dir, {
            "path": str(path),
            "state": state.to_json(),
            "forked": forked,
            "fresh": fresh,
            "finished": not fresh and not forked and _finished(path, plan.config.training.steps),
        }

    run_dir, told = on_rank_0(channel, look) or (None, {})
    told = json.loads(channel.broadcast(json.dumps(told).encode()))
    state = RunState.from_json(told["state"], "state.json")
    return run_dir, _Opening(Path(told["path"]), state, told["forked"], told["finished"], told["fresh"])


def _choose(plan: Plan, threads: int) -> Path:
    config = plan.config
    if config.output.run_dir is not None:
        return Path(config.output.run_dir)
    if config.resume == "auto":
        unfinished = find_unfinished(config.name, plan.resolved(threads, Path("runs")), plan.data_sha256())
        if unfinished is not None:
            log.info("%s", f"going on with the unfinished run {unfinished} (resume=never starts another one)")
            return unfinished
    return default_run_dir(config.name)


def _look(run_dir: RunDir, plan: Plan, resolved: dict[str, Any]) -> tuple[RunState, list[str], bool]:
    """(state, forked changes, whether the run is new)."""
    path, data = run_dir.path, plan.data_sha256()
    if not run_dir.journalled:
        return RunState(data), [], True  # nothing was done here that a changed recipe could contradict
    if plan.config.resume == "never":
        raise MachineError(
            "the run directory already holds a run",
            where=str(path),
            why="resume is never",
            remedy="choose another output.run_dir, or leave resume away to go on with it",
        )
    if not (path / "resolved.yaml").is_file():
        return RunState(data), [], False
    changed, rounding = changes(path, resolved)
    state = run_dir.state() or RunState(data)
    if state.data_sha256 != data:
        changed.append(Difference("data (training examples)", state.data_sha256[:12], data[:12]))
    if plan.config.resume != "fork":
        refuse_changes(path, changed)
    for difference in rounding:
        log.info("%s", f"going on with another setting that may change the last bits: {difference}")
    state.data_sha256, state.starts = data, state.starts + 1
    return state, [str(difference) for difference in changed], False


def _finished(path: Path, steps: int) -> bool:
    result = read_result(path) if (path / "resolved.yaml").is_file() else None
    return result is not None and result["steps"] >= steps


def _announce(plan: Plan, channel: Channel, threads: int, opening: _Opening, compiled: Sequence[Report]) -> None:
    zo, training = plan.config.zeroth_order, plan.config.training
    log.info(
        "%s",
        f"zo_ds {zo_ds.__version__}: {zo.estimator.value}, N = {zo.num_directions}, eps {zo.eps:g}, lr {zo.lr:g}, "
        f"{training.steps} steps of {training.batch_size}, {channel.world_size} rank(s) x {threads} thread(s), "
        f"ZeRO stage {plan.deepspeed['zero_optimization']['stage']}, "
        f"ops {', '.join(f'{op.name} {op.active}' for op in compiled if op.active != '-')}",
    )
    log.info("%s", f"run directory {opening.path}{'' if opening.fresh else ' (going on)'}")


def _run(job: _Job) -> dict[str, Any]:
    plan, loaded, scorer, channel, run_dir = job.plan, job.loaded, job.scorer, job.channel, job.run_dir
    config, path, state = plan.config, job.opening.path, job.opening.state
    log.info(
        "%s",
        f"model {config.model.path} ({sum(p.numel() for p in loaded.module.parameters()) / 1e6:.1f} M parameters, "
        f"{config.model.dtype}, {loaded.head}), data {config.data.path} "
        f"({len(plan.splits.train)} train, {len(plan.splits.dev)} dev, {len(plan.splits.test)} test)",
    )
    note = truncation_note(scorer, plan.splits)
    if note:
        log.warning("%s", note)
    placement = place(plan, loaded, scorer, channel)
    if placement is not None and run_dir is not None:
        log.info("%s", f"plan for each rank (docs/planning.md):\n{placement.table()}")
        run_dir.write_json("plan.json", placement.tree())
    engine = initialize(
        loaded.module, config, loss_fn=scorer.loss, channel=channel, weights=loaded.source, placement=placement
    )
    log.info("%s", _who_does_what(engine))
    settle(engine, scorer, plan)
    agree(channel, f"{plan.fingerprint()} {engine.digest()}".encode(), "the recipe, the data or the base weights")
    limits = (config.parallel.hang_s, config.parallel.timeout_s)
    log_file = path / log_name(channel.rank)
    with Guard(local_peers(channel), *limits, launched=job.launched, stacks=log_file) as guard:
        engine.stop_when(lambda: guard.stop_requested)
        session = Session(plan, channel, engine, loaded, scorer, run_dir, path, state, guard)
        try:
            session.score_base()
            set_up = time.perf_counter() - job.started
            begun = time.perf_counter()
            with guard.patience():
                resumed = open_run(engine, path, _options(plan, loaded, session, guard))
            if resumed.step > config.training.steps:
                raise ConfigError(
                    f"the run has {resumed.step} steps already",
                    where=f"training.steps={config.training.steps}",
                    remedy=f"ask for {resumed.step} or more; `zo_ds replay {path} --steps N` gives earlier weights",
                )
            opened = time.perf_counter() - begun
            _say_where(resumed)
            state.forget_after(resumed.step)
            forked = job.opening.forked or list(resumed.changed)
            if forked:
                # The old recipe stays until the fork is on record, so that a kill in between changes nothing.
                session.fork(resumed.step, forked)
                job.explain()
            shown = path if run_dir is not None else None
            with Progress(
                shown, config.training.steps, tensorboard=config.output.tensorboard, steps_done=resumed.step
            ) as progress:
                values = {"set_up_s": set_up, "open_s": opened, "replay_s": resumed.seconds}
                progress.event("start", resumed.step, {**values, "replayed": float(resumed.replayed)})
                result = session.run(progress)
        except PeerError as error:
            if guard.stop_requested:
                raise StoppedError("stopped, as asked", remedy="the same command goes on from here") from error
            raise
        finally:
            engine.close_journal()
        engine.close()
    log.info("%s", f"journal {path / 'journal'}, model {path / 'model'}, plots: tensorboard --logdir {path}")
    return result


def _who_does_what(engine: ZOEngine) -> str:
    layout, grid = engine.layout, engine.grid
    holders = "every rank holds all weights" if layout.size == 1 else f"{layout.size} ranks hold one copy together"
    return (
        f"layout {layout.kind.value}: {holders}; grid: population {grid.population} x data {grid.data}; "
        f"scalars over {type(engine.channel).__name__}"
    )


def _options(plan: Plan, loaded: LoadedModel, session: Session, guard: Guard) -> Options:
    model = plan.config.model
    return Options(
        settings=plan.config.journal,
        total_steps=plan.config.training.steps,
        base_model={**model.model_dump(mode="json"), "classes": len(plan.task.label_words)},
        fork=plan.config.resume == "fork",
        extras=lambda folder: write_extras(session.store, loaded.tokenizer, folder),
        warn=lambda text: log.warning("%s", text),
        patience=guard.patience,
    )


def _say_where(resumed: Resumed) -> None:
    if not resumed.step:
        return
    begin = f"snapshot {resumed.snapshot}" if resumed.snapshot else "the base model"
    log.info(
        "%s",
        f"at step {resumed.step}: {begin} and {resumed.replayed} replayed steps "
        f"({resumed.seconds:.2f} s); every journalled step is there",
    )
