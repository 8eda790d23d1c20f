"""The measured part of a run: score, train, score; picks up where an earlier process of the same run stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from zo_ds.data.examples import Example
from zo_ds.engine.base import StepOutput
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.export import NOTE
from zo_ds.engine.first_order import FORWARDS_PER_UNIT, FirstOrderEngine
from zo_ds.engine.lr_range import affordable
from zo_ds.engine.resume import JOURNAL
from zo_ds.errors import DataError, MachineError
from zo_ds.evaluation.evaluate import Evaluation, evaluate
from zo_ds.forward.evaluator import Result
from zo_ds.journal.history import read_journal
from zo_ds.journal.stream import from_bytes, to_bytes
from zo_ds.maths.estimators import forwards
from zo_ds.models.adapters import base_source
from zo_ds.stores.base import WeightStore, weights_sha256
from zo_ds.tensor_files import folder_files
from zo_ds.trainer.health import Guard
from zo_ds.trainer.job import encode_units, make_sampler
from zo_ds.trainer.report import Progress, clock, log
from zo_ds.trainer.result import result_of
from zo_ds.trainer.run import Run
from zo_ds.trainer.start import begin


class Session:
    """Everything after set-up.

    Args:
        run: what is trained, and where its results go; its state is kept up to date.
        engine: at its base weights.
        guard: told about progress.
    """

    def __init__(self, run: Run, engine: ZOEngine | FirstOrderEngine, guard: Guard) -> None:
        self._plan, self._channel, self._engine = run.plan, run.channel, engine
        self._loaded, self._asking, self._run_dir, self._path = run.loaded, run.asking, run.run_dir, run.path
        self._state, self._guard = run.opening.state, guard
        self._progress: Progress | None = None
        self._last_step: StepOutput | None = None
        self._started = time.perf_counter()

    @property
    def store(self) -> WeightStore:
        """Holds the weights."""
        return self._engine.store

    def score_base(self) -> None:
        """Take the zero-shot score, unless an earlier life has it. The engine must be at its base weights."""
        if self._state.zero_shot is None:
            self._state.zero_shot = self._evaluate("test", " zero-shot", 0)
            self._keep_state()

    def measure_lr(self) -> None:
        """Find a learning rate by trying, if the run is long enough to pay for that; else the rule's stays."""
        engine, training = self._engine, self._plan.config.training
        assert isinstance(engine, ZOEngine)
        if not affordable(engine.config, training.steps):
            log.warning("%s", f"{training.steps} steps are too few for a range test: the rule's learning rate is used")
            return
        sampler = make_sampler(self._plan.config, self._plan.task, self._plan.splits, self._asking.learner)

        def units(number: int) -> tuple[list[Any], Any]:
            examples = [self._plan.splits.train[index] for index in sampler.indices(number)]
            return self._units(examples), self._spare(examples)

        with self._guard.patience():
            found = engine.measure_lr(units)
        tried = ", ".join(f"{lr:.3g} {loss:.4f}" for lr, loss in sorted(found.trials))
        log.info(
            "%s", f"range test, {found.forwards} forwards: loss {found.loss:.4f} before, after one step of {tried}"
        )

    def fork(self, step: int, changed: list[str]) -> None:
        """Note that the mathematics is another from this step on."""
        self._state.forks = [fork for fork in self._state.forks if fork["step"] < step]
        forwards = self._state.forwards(step, self._forwards_per_step())
        if any(change.startswith(("task.", "data")) for change in changed):
            self._state.dev = {}  # scores of another question
        self._state.forks.append({"step": step, "forwards": forwards, "changes": changed})
        self._keep_state()
        log.warning("%s", f"forked at step {step}: {'; '.join(changed)}")

    def run(self, progress: Progress) -> dict[str, Any]:
        """Train from where the engine is, score; returns what result.json holds."""
        self._progress = progress
        training, state = self._plan.config.training, self._state
        sampler = make_sampler(self._plan.config, self._plan.task, self._plan.splits, self._asking.learner)
        self._report_the_unreported(progress)
        if self._engine.steps_done == 0 and state.zero_shot is not None:
            progress.evaluation(0, "test", state.zero_shot)
        if self._due(self._engine.steps_done) and self._engine.steps_done not in state.dev:
            self._keep_best(self._engine.steps_done)
        while self._engine.steps_done < training.steps and not self._out_of_patience():
            examples = [self._plan.splits.train[index] for index in sampler.indices(self._engine.steps_done)]
            out = self._engine.step(self._units(examples), self._spare(examples))
            self._guard.progress()
            self._last_step = out
            evaluations = out.forwards // (training.batch_size // training.micro_batch_size)
            progress.step(out, evaluations * sum(map(self._asking.learner.length, examples)))
            if self._due(out.step + 1):
                self._keep_best(out.step + 1)
        if self._out_of_patience():
            log.info("%s", f"no better model in {training.patience} evaluations: stopped after {self._steps} steps")
        elif self._steps not in state.dev:
            self._keep_best(self._steps)
        best_step, _ = state.best(training.best_by)
        if not self._plan.config.output.save_model:
            best_step = self._steps
        self._return_to(best_step)
        final = self._evaluate("test", f" after step {best_step}", self._steps)
        return self._result(best_step, final)

    @property
    def _steps(self) -> int:
        return self._engine.steps_done

    def _out_of_patience(self) -> bool:
        training = self._plan.config.training
        return self._state.out_of_patience(training.patience, training.best_by)

    def _report_the_unreported(self, progress: Progress) -> None:
        if not progress.unreported:
            return
        history = read_journal(self._path / JOURNAL)
        known = {record.step: record for segment in history.segments for record in segment.records}
        for step in progress.unreported:
            if step in known:
                progress.recorded(known[step], *self._engine.scheduled(step))

    def _result(self, best_step: int, final: Evaluation) -> dict[str, Any]:
        metric, zero_shot = final.metric, self._state.zero_shot
        total = self._state.forwards(self._steps, self._forwards_per_step())
        seconds = self._state.seconds + time.perf_counter() - self._started
        before = f"{zero_shot.score:.4f} zero-shot -> " if zero_shot else ""
        log.info(
            "%s",
            f"test {metric} {before}{final.score:.4f} after {best_step} steps, {total} forwards, {clock(seconds)}",
        )
        if self._last_step is not None:
            log.info("%s", _moved(self._last_step))
        result = result_of(
            final,
            forwards=total,
            seconds=seconds,
            steps=self._steps,
            best_step=best_step,
            starts=self._state.starts,
            stopped_early=self._steps < self._plan.config.training.steps,
        )
        return result | {
            f"zero_shot_{metric}": zero_shot.score if zero_shot else None,
            "zero_shot_loss": zero_shot.loss if zero_shot else None,
            "weights_sha256": self._engine.digest(),
        }

    def _due(self, steps: int) -> bool:
        """Whether the dev set is scored after so many steps."""
        training = self._plan.config.training
        return steps > 0 and (
            steps == training.steps or (training.eval_every is not None and steps % training.eval_every == 0)
        )

    def _forwards_per_step(self) -> int:
        training, engine = self._plan.config.training, self._engine
        own = FORWARDS_PER_UNIT if isinstance(engine, FirstOrderEngine) else forwards(engine.config.estimator_spec)
        return own * (training.batch_size // training.micro_batch_size)

    def _units(self, examples: list[Example]) -> list[Any]:
        micro = self._plan.config.training.micro_batch_size
        return encode_units(examples, micro, self._asking.learner, self._engine.grid, self._engine.device)

    def _spare(self, examples: list[Example]) -> Any:
        if not self._engine.layout.lockstep:
            return None
        micro = self._plan.config.training.micro_batch_size
        return self._asking.learner.encode(examples[:micro]).to(self._engine.device)

    def _evaluate(self, split: str, note: str, step: int) -> Evaluation:
        examples = {"dev": self._plan.splits.dev, "test": self._plan.splits.test}[split]
        batch_size = self._plan.config.training.eval_batch_size
        lockstep = self._engine.layout.lockstep
        device = self._engine.device
        judge = self._asking.judge
        found = evaluate(self._call, judge, examples, batch_size, self._channel, device, lockstep=lockstep)
        if self._progress is not None:
            self._progress.evaluation(step, split, found)
        log.info("%s", f"{split} {found}{note}")
        return found

    def _call(self, function: Callable[[torch.nn.Module, Any], Result], batch: Any) -> Result:
        self._guard.beat()
        return self._engine.call(function, batch)

    def _keep_best(self, step: int) -> None:
        by = self._plan.config.training.best_by
        before = self._state.best(by)[1]
        found = self._evaluate("dev", f" after step {step}", step)
        if self._plan.config.output.save_model and found.better_than(before, by):
            self._save_model(step)
        # Behind the model: a score that is known must have its model.
        self._state.dev[step] = found
        self._keep_state()
        self._guard.beat()

    def _save_model(self, step: int) -> None:
        note = {"step": step, "weights_sha256": self._engine.digest(), "base_model": self._plan.config.model.path}
        with self._guard.patience():
            self._engine.save_pretrained(self._path / "model", self._loaded.tokenizer, note)

    def _keep_state(self) -> None:
        if self._run_dir is not None:
            now = time.perf_counter()
            self._state.seconds, self._started = self._state.seconds + now - self._started, now
            self._run_dir.write("state.json", self._state.to_json())

    def _return_to(self, step: int) -> None:
        """Go back to the weights after so many steps: from the kept model, else by replay."""
        there = step == self._engine.steps_done
        # Rank 0 reads all of the files; whoever does not see them shall not take part in reading them.
        kept = self._kept(step, check=self._channel.rank == 0)
        flags = [bool(flag) for flag in self._channel.all_gather(torch.tensor([kept is not None]))]
        if not there:
            log.info("%s", f"back to the best model on the dev set, after step {step}")
            with self._guard.patience():
                if not (all(flags) and self._load(kept)):
                    self._rebuild(step)
        if not flags[0] and self._plan.config.output.save_model:
            self._save_model(step)

    def _kept(self, step: int, check: bool) -> str | None:
        """The digest of the weights in RUN/model, if they are those after so many steps.

        Args:
            step: number of steps.
            check: compare it with what the files hold.
        """
        folder = self._path / "model"
        try:
            note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
            if note["step"] != step:
                return None
            digest, files = str(note["weights_sha256"]), folder_files(folder)
            infos = self._engine.store.parameters.values()
            if check and weights_sha256((info.name, files.tensor(info.name)) for info in infos) != digest:
                return None
            return digest
        except (OSError, ValueError, KeyError, DataError):
            return None

    def _load(self, digest: str | None) -> bool:
        """Take the kept model's weights; whether every rank has them then."""
        self._engine.load_weights(folder_files(self._path / "model").read)
        found = self._engine.digest() == digest
        return all(bool(flag) for flag in self._channel.all_gather(torch.tensor([found])))

    def _journal_until(self, step: int) -> bytes:
        if self._run_dir is None:
            return b""
        return to_bytes(read_journal(self._path / JOURNAL), 0, step)

    def _rebuild(self, step: int) -> None:
        """Take the weights that the journal leads to from the base model."""
        if isinstance(self._engine, FirstOrderEngine):
            raise MachineError(
                f"the best model, after step {step}, is gone",
                where=str(self._path / "model"),
                why="it was damaged or removed while the run went on, and a first-order run has no journal",
                remedy="train again",
            )
        raw = self._channel.broadcast(self._journal_until(step))
        config, classes = self._plan.config, self._plan.task.classes
        self._engine.load_weights(base_source(config.model, config.peft, classes, self._loaded))
        begin(self._engine, self._loaded, self._path, fresh=False)
        self._engine.replay(from_bytes(raw, "journal"))


def _moved(out: StepOutput) -> str:
    """The bytes that the last step moved, on rank 0."""
    ways = {
        "from host to device": out.traffic.link,
        "gathered from the shard group": out.traffic.gathered,
        "read from disk": out.traffic.disk_read,
        "written to disk": out.traffic.disk_written,
    }
    parts = [f"{count / 1e6:,.1f} MB {way}" for way, count in ways.items() if count]
    return f"moved in the last step, rank 0: {'; '.join([*parts, f'{out.sent} bytes to other ranks'])}"
