"""`zo_ds eval`, `replay` and `audit`: what is done with a run that is over (or was killed)."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_ds.config.load import load_config
from zo_ds.config.schema import ModelConfig, PeftConfig, ZOConfig
from zo_ds.engine.export import save_pretrained
from zo_ds.engine.initialize import initialize
from zo_ds.engine.resume import JOURNAL, SNAPSHOTS
from zo_ds.errors import ConfigError, CorruptRunError, DataError
from zo_ds.evaluation.evaluate import evaluate
from zo_ds.journal.history import History, read_journal
from zo_ds.journal.recovery import Start, choose_start
from zo_ds.journal.replay import Replayed, replay_
from zo_ds.journal.snapshot import committed, verify
from zo_ds.models.adapters import load_adapted
from zo_ds.models.harness import lm_eval_scores
from zo_ds.models.load import LoadedModel
from zo_ds.parallel.launched import open_channel
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore, fill_in_place
from zo_ds.tasks.registry import resolve_task
from zo_ds.tensor_files import folder_files
from zo_ds.trainer.environment import use_threads
from zo_ds.trainer.job import check, load, settle
from zo_ds.trainer.report import clock, log
from zo_ds.trainer.run_dir import read_result
from zo_ds.trainer.start import read_start, source_of_start

_SHOW_EVERY_S = 2.0


@dataclass(frozen=True)
class Harness:
    """What to score with the lm-eval harness.

    Attributes:
        tasks: by the harness's names.
        limit: examples of each; None: all.
        include: folder with further task files.
    """

    tasks: tuple[str, ...]
    limit: int | None
    include: str | None


def evaluate_run(run: Path, harness: Harness | None = None) -> dict[str, Any]:
    """Score the model a run kept on its test set.

    Args:
        run: its directory.
        harness: what to score beside that.

    Returns:
        the metrics of the task, loss, test_examples, weights_sha256; lm_eval.

    Raises:
        DataError: the directory is no run, or holds no model.
    """
    read_result(run)
    config = load_config(run / "resolved.yaml")
    weights = folder_files(run / "model")
    channel = open_channel(config.parallel.timeout_s, config.parallel.channel)
    use_threads(config.parallel.threads, channel.local_world_size)
    plan = check(config, channel)
    loaded, asking = load(plan)
    engine = initialize(loaded.module, config, loss_fn=asking.loss_fn, channel=channel, weights=loaded.source)
    settle(engine, asking, plan)
    engine.load_weights(weights.read)
    batch_size = config.training.eval_batch_size
    lockstep = engine.layout.lockstep
    found = evaluate(engine.call, asking.judge, plan.splits.test, batch_size, channel, engine.device, lockstep=lockstep)
    result: dict[str, Any] = {
        **found.values,
        "test_examples": found.examples,
        "weights_sha256": engine.digest(),
    }
    if harness is not None:
        device = str(engine.device)

        def score(model: torch.nn.Module, _: None) -> dict[str, dict[str, float]]:
            return lm_eval_scores(
                model,
                loaded.tokenizer,
                harness.tasks,
                device,
                limit=harness.limit,
                batch_size=batch_size,
                include=harness.include,
            )

        result["lm_eval"] = engine.call(score, None)
    engine.close()
    return result


@dataclass(frozen=True)
class Rebuilt:
    """A model whose weights were replayed.

    Attributes:
        loaded: the model, weights and all.
        replayed: digest and hashes.
        seconds: that the replay took.
    """

    loaded: LoadedModel
    replayed: Replayed
    seconds: float


def rebuild(
    config: ModelConfig,
    peft: PeftConfig,
    classes: int,
    history: History,
    steps: int,
    *,
    begun: Mapping[str, Tensor] | None = None,
    start: Start | None = None,
    hash_at: Collection[int] = (),
) -> Rebuilt:
    """Load a base model and replay a journal on it, with progress on the screen.

    Args:
        config: of the base model.
        peft: of the adapter.
        classes: of the task.
        history: the journal.
        steps: how many.
        begun: first weights that the base model does not give, see `read_start`.
        start: where from, the base weights if None.
        hash_at: steps before which the weights are hashed.

    Raises:
        ZODSError: see `replay_` and `load_adapted`.
    """
    loaded, first = load_adapted(config, peft, classes), 0
    fill_in_place(loaded.module, None)
    parameters = trainable_parameters(loaded.module)
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    store = ResidentStore(loaded.module, parameters, history.header.noise)
    snapshot = None if start is None else start.snapshot
    if loaded.source is not None and (snapshot is None or store.partial):
        store.fill(loaded.source)
    if begun is not None:
        store.fill(source_of_start(begun), frozen=False)
    if start is not None and snapshot is not None:
        first = start.step
        store.fill(folder_files(snapshot).read, frozen=False)
    tensors = {info.name: parameter.data for parameter, info in parameters.items()}
    meter = _Meter({info.name: info.numel for info in parameters.values()}, history, first, steps)
    log.info("%s", f"replaying {steps - first} steps on {len(parameters)} parameters of {config.path}")
    replayed = replay_(tensors, history, steps, first=first, hash_at=hash_at, progress=meter.done)
    return Rebuilt(loaded, replayed, meter.seconds)


def replay_run(run: Path, steps: int | None, save_to: Path | None) -> dict[str, Any]:
    """Rebuild a run's weights from its base model and its journal, without data.

    Args:
        run: its directory.
        steps: how many steps; None: those of the model that the run kept, or all if it did not finish.
        save_to: folder for the model, in Hugging Face layout; None: only check.

    Returns:
        steps, weights_sha256, and matches: whether that is the digest in result.json (None if there is none to
        compare with).

    Raises:
        DataError: the directory is no run.
        ConfigError: the journal has fewer steps.
        CorruptRunError: the journal is damaged, the base model is another, or the weights are not those of result.json.
    """
    result = read_result(run)
    config = load_config(run / "resolved.yaml")
    history = _journal_of(run, config)
    kept = result["best_step"] if result is not None else None
    known = max(segment.end_step for segment in history.segments)
    if steps is None:
        steps = kept if kept is not None else history.steps
    if steps < 0 or (steps > known and history.whole):
        raise ConfigError(f"the journal has {known} steps, not {steps}", where="--steps")
    if steps > known:
        raise history.damage(known)
    start = None
    if history.steps < steps:
        log.warning("%s", f"the journal is damaged ({'; '.join(history.problems)}); starting from a snapshot")
        start = choose_start(history, run / SNAPSHOTS, lambda text: log.warning("%s", text), last=steps, move=False)
        if start.end < steps:
            raise history.damage(start.end)
    classes = resolve_task(config.task, config.data).classes
    built = rebuild(config.model, config.peft, classes, history, steps, begun=read_start(run), start=start)
    digest = built.replayed.weights_sha256
    matches = digest == result["weights_sha256"] if result is not None and steps == kept else None
    if matches is False:
        raise CorruptRunError(
            "the replayed weights are not those of the run",
            where=str(run / JOURNAL),
            why=f"SHA-256 {digest[:16]}..., result.json has {result['weights_sha256'][:16] if result else ''}...",
            remedy="check that journal/ and result.json belong to the same run",
        )
    if save_to is not None:
        save_rebuilt(built, history, save_to, steps)
    return {"steps": steps, "weights_sha256": digest, "matches": matches}


def save_rebuilt(built: Rebuilt, history: History, folder: Path, steps: int) -> None:
    """Write a replayed model in Hugging Face layout."""
    parameters = trainable_parameters(built.loaded.module)
    store = ResidentStore(built.loaded.module, parameters, history.header.noise)
    note = {
        "step": steps,
        "weights_sha256": built.replayed.weights_sha256,
        "run_id": history.header.run_id,
        "base_model": history.header.base_model,
    }
    save_pretrained(store, folder, built.loaded.tokenizer, note)


def audit_run(run: Path) -> dict[str, Any]:
    """Replay a run from its base model, and compare with every hash that was taken of the live weights.

    Returns:
        steps, hashes: how many were compared, problems: in words, empty if all is well.

    Raises:
        DataError: the directory is no run.
        CorruptRunError: nothing can be replayed.
    """
    result = read_result(run)
    config = load_config(run / "resolved.yaml")
    history = _journal_of(run, config)
    problems = [] if history.whole else list(history.problems)
    records = history.records()
    taken = {record.step: record.state_hash for record in records if record.state_hash is not None}
    saved = {}
    for folder in committed(run / SNAPSHOTS):
        try:
            saved[folder] = verify(folder)
        except CorruptRunError as error:
            problems.append(f"{error.where}: {error.why}")
    within = {info.step for info in saved.values() if info.step <= len(records)}
    classes, hash_at = resolve_task(config.task, config.data).classes, taken.keys() | within
    built = rebuild(config.model, config.peft, classes, history, len(records), begun=read_start(run), hash_at=hash_at)
    wrong = [step for step, value in taken.items() if built.replayed.hashes[step] != value]
    if wrong:
        problems.append(
            f"the weights in memory before step {wrong[0]} were not those that the journal leads to "
            f"({len(wrong)} of {len(taken)} hashes differ)"
        )
    ended_here = result is not None and result["best_step"] == len(records)
    if ended_here and result is not None and built.replayed.weights_sha256 != result["weights_sha256"]:
        problems.append("the replayed weights are not those in result.json")
    problems += [
        f"{folder}: its weights are not those that the journal leads to"
        for folder, info in saved.items()
        if built.replayed.hashes.get(info.step, info.state_hash) != info.state_hash
    ]
    return {"steps": len(records), "hashes": len(taken), "problems": problems}


def _journal_of(run: Path, config: ZOConfig) -> History:
    if config.method != "zeroth_order":
        raise DataError(
            f"a run of method {config.method} has no journal",
            where=str(run),
            why="only a zeroth-order run is a log of scalars",
            remedy="`zo_ds eval` scores its model again",
        )
    return read_journal(run / JOURNAL)


class _Meter:
    """Progress of a replay: share, rate and time left."""

    def __init__(self, sizes: dict[str, int], history: History, first: int, steps: int) -> None:
        self._sizes, self._total, self._done = sizes, sum(sizes.values()), 0
        stretches = history.stretches(first, steps) if first <= steps <= history.segments[-1].end_step else []
        self._terms = sum(len(record.update.terms) for stretch in stretches for record in stretch.records)
        self._started = self._shown = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def done(self, name: str) -> None:
        self._done += self._sizes[name]
        now = time.perf_counter()
        if now - self._shown < _SHOW_EVERY_S:
            return
        self._shown = now
        share, rate = self._done / self._total, self._done * self._terms / (now - self._started)
        left = (now - self._started) * (1 - share) / share
        log.info("%s", f"replay {share:.0%} | {rate:.2e} parameters x directions/s | ETA {clock(left)}")
