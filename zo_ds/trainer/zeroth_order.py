"""A zeroth-order run: engine, journal, session."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from zo_ds.config.schema import OutputConfig
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.export import write_extras
from zo_ds.engine.initialize import initialize
from zo_ds.engine.resume import Options, Resumed, open_run
from zo_ds.errors import ConfigError, PeerError, StoppedError
from zo_ds.parallel.channel import agree
from zo_ds.trainer.health import Guard, local_peers
from zo_ds.trainer.job import settle
from zo_ds.trainer.place import place
from zo_ds.trainer.report import Progress, log, log_name
from zo_ds.trainer.run import Run
from zo_ds.trainer.session import Session
from zo_ds.trainer.start import begin


def zeroth_order(run: Run) -> dict[str, Any]:
    """Train with forward passes, or go on with it; returns what result.json holds; collective.

    Raises:
        ZODSError: see the subclasses.
    """
    engine = _engine(run)
    plan, channel, config = run.plan, run.channel, run.plan.config
    agree(channel, f"{plan.fingerprint()} {engine.digest()}".encode(), "the recipe, the data or the base weights")
    with guard_of(run) as guard:
        engine.stop_when(lambda: guard.stop_requested)
        session = Session(run, engine, guard)
        try:
            session.score_base()
            if config.zeroth_order.lr == "auto" and run.opening.fresh:
                session.measure_lr()
            set_up = time.perf_counter() - run.started
            begun = time.perf_counter()
            with guard.patience():
                resumed = open_run(engine, run.path, _options(run, session, guard))
            if resumed.step > config.training.steps:
                raise ConfigError(
                    f"the run has {resumed.step} steps already",
                    where=f"training.steps={config.training.steps}",
                    remedy=f"ask for {resumed.step} or more; `zo_ds replay {run.path} --steps N` gives earlier weights",
                )
            if engine.found_lr is not None:
                log.info("%s", f"learning rate {engine.found_lr['value']:.3g}, by {engine.found_lr['how']}")
            opened = time.perf_counter() - begun
            _say_where(resumed)
            run.opening.state.forget_after(resumed.step)
            forked = run.opening.forked or list(resumed.changed)
            if forked:
                # The old recipe stays until the fork is on record, so that a kill in between changes nothing.
                session.fork(resumed.step, forked)
                run.explain()
            with Progress(
                run.shown, config.training.steps, tensorboard=config.output.tensorboard, steps_done=resumed.step
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
    log.info("%s", _what_it_left(run.path, config.output))
    return result


def _what_it_left(path: Path, output: OutputConfig) -> str:
    left = [f"journal {path / 'journal'}"]
    if output.save_model:
        left.append(f"model {path / 'model'}")
    if output.tensorboard:
        left.append(f"plots: tensorboard --logdir {path}")
    return ", ".join(left)


def guard_of(run: Run) -> Guard:
    """Watches over the run's processes."""
    parallel = run.plan.config.parallel
    return Guard(
        local_peers(run.channel),
        parallel.hang_s,
        parallel.timeout_s,
        launched=run.launched,
        stacks=run.path / log_name(run.channel.rank),
    )


def _engine(run: Run) -> ZOEngine:
    """The engine at its base weights, which knows how the model takes sequences."""
    plan, loaded, asking, channel = run.plan, run.loaded, run.asking, run.channel
    placement = place(plan, loaded, asking.learner, channel)
    if placement is not None and run.run_dir is not None:
        log.info("%s", f"plan for each rank (docs/planning.md):\n{placement.table()}")
        run.run_dir.write_json("plan.json", placement.tree())
    engine = initialize(
        loaded.module, plan.config, loss_fn=asking.loss_fn, channel=channel, weights=loaded.source, placement=placement
    )
    log.info("%s", _who_does_what(engine))
    begin(engine, loaded, run.path, fresh=run.opening.fresh)
    settle(engine, asking, plan)
    return engine


def _who_does_what(engine: ZOEngine) -> str:
    layout, grid = engine.layout, engine.grid
    holders = "every rank holds all weights" if layout.size == 1 else f"{layout.size} ranks hold one copy together"
    return (
        f"layout {layout.kind.value}: {holders}; grid: population {grid.population} x data {grid.data}; "
        f"scalars over {type(engine.channel).__name__}"
    )


def _options(run: Run, session: Session, guard: Guard) -> Options:
    config = run.plan.config
    peft = {} if config.peft.method == "none" else {"peft": config.peft.model_dump(mode="json")}
    return Options(
        settings=config.journal,
        total_steps=config.training.steps,
        base_model={**config.model.model_dump(mode="json"), **peft, "classes": run.plan.task.classes},
        fork=config.resume == "fork",
        extras=lambda folder: write_extras(session.store, run.loaded.tokenizer, folder),
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
