"""A first-order run: data, loss, evaluation and report of a zeroth-order one, with gradients and no journal."""

from __future__ import annotations

from typing import Any

from zo_ds.engine.open_first_order import initialize_first_order
from zo_ds.parallel.channel import agree
from zo_ds.trainer.job import settle
from zo_ds.trainer.report import Progress, log
from zo_ds.trainer.run import Run
from zo_ds.trainer.session import Session
from zo_ds.trainer.zeroth_order import guard_of


def first_order(run: Run) -> dict[str, Any]:
    """Train with gradients; returns what result.json holds; collective.

    Raises:
        ConfigError: see `initialize_first_order`.
        ZODSError: see the subclasses.
    """
    plan, channel, config, loaded = run.plan, run.channel, run.plan.config, run.loaded
    engine = initialize_first_order(
        loaded.module, config, loss_fn=run.asking.loss_fn, channel=channel, weights=loaded.source
    )
    log.info("%s", "gradients are not journalled: a first-order run that dies starts anew")
    settle(engine, run.asking, plan)
    agree(channel, f"{plan.fingerprint()} {engine.digest()}".encode(), "the recipe, the data or the base weights")
    with guard_of(run) as guard:
        engine.stop_when(lambda: guard.stop_requested)
        session = Session(run, engine, guard)
        try:
            session.score_base()
            with Progress(run.shown, config.training.steps, tensorboard=config.output.tensorboard) as progress:
                result = session.run(progress)
        finally:
            engine.close_journal()
        engine.close()
    return {**result, "memory_bytes": engine.memory}
