"""`zo_ds train`: zero-shot score, steps with evaluations in between, the best model's score."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import zo_ds
from zo_ds.config.schema import ZOConfig
from zo_ds.data.examples import Example
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.initialize import initialize
from zo_ds.errors import ZODSError
from zo_ds.evaluation.accuracy import Evaluation, evaluate
from zo_ds.journal.journal import Journal
from zo_ds.journal.records import Header
from zo_ds.models.load import LoadedModel
from zo_ds.ops.builder import Report
from zo_ds.parallel.channel import Channel, agree, open_channel
from zo_ds.tasks.scoring import Batch, Scorer
from zo_ds.trainer.environment import describe, op_reports, peak_rss_gib, use_threads
from zo_ds.trainer.job import Plan, check, encode_units, load, make_sampler, read_weights, settle, truncation_note
from zo_ds.trainer.report import Progress, clock, log, start_logging
from zo_ds.trainer.run_dir import RunDir, default_run_dir

JOURNAL = "journal.jsonl"


def train(config: ZOConfig, given: str, overrides: list[str]) -> Path | None:
    """Run a recipe on this rank.

    Args:
        config: the recipe.
        given: text of the recipe's file, kept with the run.
        overrides: from the command line, kept with the run.

    Returns:
        The run directory on rank 0, None on the others.

    Raises:
        ZODSError: see the subclasses; the run directory's log has the same message.
    """
    channel = open_channel(config.parallel.timeout_s)
    threads = use_threads(config.parallel.threads, channel.local_world_size)
    start_logging(channel.rank)
    compiled = op_reports()
    plan = check(config, channel)
    run_dir = _open_run_dir(config, channel)
    try:
        loaded, scorer = load(plan)
    except ZODSError:
        if run_dir is not None:
            run_dir.discard()
        raise
    path = _shared_path(run_dir, channel)
    start_logging(channel.rank, path)
    try:
        _announce(plan, channel, threads, path, compiled)
        if run_dir is not None:
            run_dir.explain(given, overrides, plan.resolved(threads, path), plan.deepspeed)
            run_dir.write_json("env.json", describe(channel.world_size, threads))
        result = _run(plan, loaded, scorer, channel, run_dir, path)
        if run_dir is not None:
            run_dir.write_json("result.json", result)
    except Exception as error:
        log.error("%s", error)
        raise
    finally:
        if run_dir is not None:
            run_dir.close()
    return path if channel.rank == 0 else None


def _open_run_dir(config: ZOConfig, channel: Channel) -> RunDir | None:
    if channel.rank != 0:
        return None
    chosen = config.output.run_dir
    return RunDir(Path(chosen) if chosen else default_run_dir(config.name))


def _shared_path(run_dir: RunDir | None, channel: Channel) -> Path:
    """Rank 0's choice, told to all."""
    buffer = torch.zeros(4096, dtype=torch.uint8)
    if run_dir is not None:
        raw = str(run_dir.path).encode()
        buffer[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    raw = bytes(channel.all_gather(buffer)[0].tolist())
    return Path(raw.rstrip(b"\0").decode())


def _announce(plan: Plan, channel: Channel, threads: int, path: Path, compiled: Sequence[Report]) -> None:
    zo, training = plan.config.zeroth_order, plan.config.training
    log.info(
        "%s",
        f"zo_ds {zo_ds.__version__}: {zo.estimator.value}, N = {zo.num_directions}, eps {zo.eps:g}, lr {zo.lr:g}, "
        f"{training.steps} steps of {training.batch_size}, {channel.world_size} rank(s) x {threads} thread(s), "
        f"ZeRO stage {plan.deepspeed['zero_optimization']['stage']}, "
        f"ops {', '.join(f'{op.name} {op.active}' for op in compiled if op.active != '-')}",
    )
    log.info("%s", f"run directory {path}")


def _run(
    plan: Plan, loaded: LoadedModel, scorer: Scorer, channel: Channel, run_dir: RunDir | None, path: Path
) -> dict[str, Any]:
    config = plan.config
    log.info(
        "%s",
        f"model {config.model.path} ({sum(p.numel() for p in loaded.module.parameters()) / 1e6:.1f} M parameters, "
        f"{config.model.dtype}, {loaded.head}), data {config.data.path} "
        f"({len(plan.splits.train)} train, {len(plan.splits.dev)} dev, {len(plan.splits.test)} test)",
    )
    note = truncation_note(scorer, plan.splits)
    if note:
        log.warning("%s", note)
    engine = initialize(loaded.module, config, loss_fn=scorer.loss, channel=channel)
    settle(engine, scorer, plan)
    base = engine.digest()
    agree(channel, f"{plan.fingerprint()} {base}".encode(), "the recipe, the data or the base weights")
    if run_dir is not None:
        engine.record_to(Journal(path / JOURNAL, _header(engine, base)))
    with Progress(
        path if run_dir is not None else None, config.training.steps, tensorboard=config.output.tensorboard
    ) as progress:
        session = _Session(plan, channel, engine, loaded, scorer, progress, path)
        result = session.run()
    engine.close()
    log.info(
        "%s", f"journal {path / JOURNAL}, model {path / 'model'}, plots: tensorboard --logdir {path / 'tensorboard'}"
    )
    return result


def _header(engine: ZOEngine, base: str) -> Header:
    return Header(
        uuid.uuid4().hex,
        engine.config.run_seed,
        engine.store.structure,
        engine.config.estimator.value,
        base,
        tuple(engine.store.parameters.values()),
        zo_ds.__version__,
    )


class _Session:
    """The measured part of a run: everything after set-up."""

    def __init__(
        self,
        plan: Plan,
        channel: Channel,
        engine: ZOEngine,
        loaded: LoadedModel,
        scorer: Scorer,
        progress: Progress,
        path: Path,
    ) -> None:
        self._plan, self._channel, self._engine = plan, channel, engine
        self._loaded, self._scorer, self._progress, self._path = loaded, scorer, progress, path
        self._best: Evaluation | None = None
        self._best_step = 0

    def run(self) -> dict[str, Any]:
        """Score, train, score; returns what result.json holds."""
        started = time.perf_counter()
        training = self._plan.config.training
        zero_shot = self._evaluate("test", " zero-shot", 0)
        forwards = 0
        sampler = make_sampler(self._plan.config, self._plan.splits, self._scorer)
        for step in range(training.steps):
            examples = [self._plan.splits.train[index] for index in sampler.indices(step)]
            out = self._engine.step(self._units(examples))
            forwards += out.forwards
            evaluations = out.forwards // (training.batch_size // training.micro_batch_size)
            self._progress.step(out, evaluations * sum(map(self._scorer.length, examples)))
            if step + 1 == training.steps or (training.eval_every and (step + 1) % training.eval_every == 0):
                self._keep_best(step + 1)
        self._return_to_best()
        final = self._evaluate("test", f" after step {self._best_step}", training.steps)
        seconds = time.perf_counter() - started
        log.info(
            "%s",
            f"test accuracy {zero_shot.accuracy:.4f} zero-shot -> {final.accuracy:.4f} after {self._best_step} steps, "
            f"{forwards} forwards, {clock(seconds)}",
        )
        return {
            "zero_shot_accuracy": zero_shot.accuracy,
            "final_accuracy": final.accuracy,
            "test_examples": final.examples,
            "steps": training.steps,
            "best_step": self._best_step,
            "forwards": forwards,
            "wall_s": round(seconds, 3),
            "peak_rss_gib": round(peak_rss_gib(), 3),
            "weights_sha256": self._engine.digest(),
            "zero_shot_loss": zero_shot.loss,
            "final_loss": final.loss,
        }

    def _units(self, examples: list[Example]) -> list[Batch]:
        micro = self._plan.config.training.micro_batch_size
        return encode_units(examples, micro, self._scorer, self._channel, self._engine.device)

    def _evaluate(self, split: str, note: str, step: int) -> Evaluation:
        examples = {"dev": self._plan.splits.dev, "test": self._plan.splits.test}[split]
        batch_size = self._plan.config.training.eval_batch_size
        found = evaluate(self._engine.call, self._scorer, examples, batch_size, self._channel, self._engine.device)
        self._progress.evaluation(step, split, found, note)
        return found

    def _keep_best(self, step: int) -> None:
        found = self._evaluate("dev", f" after step {step}", step)
        if not self._plan.config.output.save_model:
            self._best, self._best_step = found, step
        elif found.better_than(self._best, self._plan.config.training.best_by):
            self._best, self._best_step = found, step
            self._engine.save_pretrained(self._path / "model", self._loaded.tokenizer)

    def _return_to_best(self) -> None:
        if self._best_step < self._engine.steps_done:
            log.info("%s", f"back to the best model on the dev set, after step {self._best_step}")
            self._engine.load_weights(read_weights(self._path / "model"))
