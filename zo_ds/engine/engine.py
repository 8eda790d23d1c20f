"""ZOEngine: one step is losses under N directions, agreement over ranks, a journal record, and the update."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from zo_ds.config.schema import ZerothOrderConfig
from zo_ds.engine.base import Engine, StepOutput
from zo_ds.engine.durability import Durability
from zo_ds.engine.lr_range import LrRange, Units, find_lr
from zo_ds.engine.measure import Measured, Measurement
from zo_ds.engine.past import Earlier, Past
from zo_ds.engine.skips import SkipWatch
from zo_ds.errors import ConfigError, CorruptRunError, PeerError, StoppedError, ZODSError
from zo_ds.forward.displacement import Displacement, Place
from zo_ds.forward.evaluator import Batch, Evaluator
from zo_ds.journal.history import History
from zo_ds.journal.records import StepRecord, terms_of
from zo_ds.journal.replay import legs
from zo_ds.maths.estimators import SkipReason, Verdict, follow_up, probes, settle, verdict
from zo_ds.maths.lr_rule import UNKNOWN_STEPS
from zo_ds.maths.noise import step_seed
from zo_ds.maths.schedules import Schedule, scheduled
from zo_ds.maths.update import Update
from zo_ds.ops.plan import Plan
from zo_ds.parallel.channel import Channel, agree
from zo_ds.stores.base import WeightStore
from zo_ds.tensor_files import Source


class ZOEngine(Engine):
    """Wraps a model that DeepSpeed holds; made by `zo_ds.initialize`.

    Args:
        config: estimator and constants.
        store: holds theta.
        evaluator: gives losses under displacements.
        channel: to the other ranks.
        deepspeed: the DeepSpeed engine underneath.
        measurement: of the losses of a step, over all ranks.
    """

    def __init__(
        self,
        config: ZerothOrderConfig,
        store: WeightStore,
        evaluator: Evaluator,
        channel: Channel,
        deepspeed: DeepSpeedEngine,
        measurement: Measurement,
    ) -> None:
        super().__init__(store, evaluator, channel, deepspeed, measurement.grid, measurement.layout)
        self.config, self._measurement = config, measurement
        self._durability: Durability | None = None
        self._off_journal = False
        self._deferred = 0.0
        self._skips, self._past = SkipWatch(config.max_consecutive_skips), Past(config)
        self.found_lr: Mapping[str, Any] | None = None

    def take_lr(self, found: Mapping[str, Any]) -> None:
        """Use a learning rate that no recipe gave.

        Args:
            found: ``value``, and ``how`` it was found; kept in the journal.
        """
        lr = float(found["value"])
        self.found_lr = {**found, "value": lr}
        self.config = self.config.model_copy(update={"lr": lr})

    def measure_lr(self, units: Units) -> LrRange:
        """Measure a learning rate before the first step, and use it; collective.

        Args:
            units: gives this rank's micro-batches of batch number 0 and 1, and one to spare (see `step`).

        Raises:
            ConfigError: no step lowers the loss, or the run is recorded already.
        """
        if self._durability is not None:
            raise ConfigError(
                "a learning rate can be measured only before the journal is opened",
                where="engine.measure_lr",
                why="the journal's first lines say which one the run uses",
                remedy="leave run_dir away from zo_ds.initialize, and call zo_ds.engine.resume.open_run afterwards",
            )
        steps = self.config.total_steps or UNKNOWN_STEPS
        found = find_lr(self._measurement, self.config, self.store.trained, steps, units)
        self.take_lr(found.to_json())
        return found

    def record_to(self, durability: Durability) -> None:
        """Make every step last from now on; see `zo_ds.engine.resume.open_run`, which every rank must call."""
        self._durability = durability

    @property
    def durability(self) -> Durability | None:
        """Journal, snapshots and audits; None if steps are not recorded."""
        return self._durability

    def went_on(self, steps_done: int, skips: Sequence[SkipReason], past: Sequence[Earlier] = ()) -> None:
        """Take the place after recorded steps, whose updates have been applied.

        Args:
            steps_done: how many.
            skips: why the last of them were skipped. At least one more step is tried, however many there were.
            past: what the last of them mean to the next one, the newest last.
        """
        self.steps_done = steps_done
        self._skips.went_on(skips)
        self._past.restore(past)

    def step(self, batch: Batch, spare: Batch | None = None) -> StepOutput:
        """Take one step.

        Args:
            batch: this rank's examples: one micro-batch, or a list of them, empty if others have some. All of them must
                have the same number of examples; ranks with the same `grid.data_rank` must give the same ones.
            spare: a micro-batch for a rank of a shard group that has none of its own; it is not counted.

        Raises:
            DataError: there is no batch.
            ConfigError: the run is recorded, and its weights were replaced by `load_weights`.
            NonFiniteError: the last `max_consecutive_skips` steps were all skipped.
            PeerError: a rank is gone, or ranks computed different scalars.
            MachineError: the journal could not be written; nothing was applied.
            StoppedError: a rank was asked to stop; the step is done and durable.
        """
        with self._group_alive():
            return self._step(batch, spare)

    def _step(self, batch: Batch, spare: Batch | None) -> StepOutput:
        started, sent, moved = time.perf_counter(), self.channel.sent, self.store.traffic.copy()
        units = batch if isinstance(batch, list) else [batch]
        if self._off_journal:
            raise ConfigError(
                "no further step can be recorded: the weights were replaced",
                where="engine.step after engine.load_weights",
                why="the journal would no longer lead to the weights",
                remedy="make an engine of these weights with another run_dir",
            )
        step, lr, eps = self.steps_done, *self.scheduled(self.steps_done)
        state_hash = self._durability.state_hash(step) if self._durability else None
        found, measured, evaluations = self._decide(units, spare, step, lr, eps)
        record = StepRecord(self._update(step, found, lr), found.skip, found.clean_loss, found.spread, state_hash)
        self._agree(record)
        stop = self._commit(record)
        self._apply(record)
        self._skips.note(found.skip, measured, step)
        if stop:
            raise StoppedError(
                f"stopped after step {step + 1}, as asked",
                remedy="the same command goes on from here",
            )
        seconds = time.perf_counter() - started
        forwards = evaluations * measured.units
        return StepOutput(
            step,
            found.clean_loss,
            found.spread,
            found.coefficients,
            found.skip,
            lr,
            eps,
            forwards,
            seconds,
            self.channel.sent - sent,
            self.store.traffic.since(moved),
        )

    def _decide(
        self, units: list[Batch], spare: Batch | None, step: int, lr: float, eps: float
    ) -> tuple[Verdict, Measured, int]:
        """What the losses say, the last ones that were measured, and how many evaluations it took."""
        spec, seed = self.config.estimator_spec, step_seed(self.config.run_seed, step)
        places: list[Place] = [Displacement(seed, p.direction, p.side * eps) if p.side else None for p in probes(spec)]
        measured = self._measurement.run(units, places, f"step {step}", spare)
        before = self._past.spread
        # A spread is as large as its radius.
        previous = None if before is None else before * (eps / self.scheduled(step - 1)[1])
        found = verdict(measured.means, spec, lr, eps, previous)
        if tried := follow_up(spec, found):
            more: list[Place] = [Displacement(seed, 0, -coefficient) if coefficient else None for coefficient in tried]
            measured = self._measurement.run(units, more, f"step {step}, second look", spare)
            found = settle(found, tried, measured.means)
        return found, measured, len(places) + len(tried)

    def load_weights(self, weights: Mapping[str, Tensor] | Source) -> None:
        """Overwrite the trained weights, for example with those of the best step; collective.

        Args:
            weights: whole parameters by name, or what fills each one's part that this rank holds.
        """
        if self._durability is not None:
            self._durability.before_apply()
            self._off_journal = True
        self._past.restore(())
        super().load_weights(weights)

    def replay(self, history: History) -> None:
        """Apply a journal to the base weights, which must be loaded; collective, outside of the run's own journal.

        Raises:
            CorruptRunError: these are not the base weights of the journal.
        """
        if self.digest() != history.header.base_sha256:
            raise CorruptRunError(
                "these are not the weights the run started from",
                where="base model",
                remedy="use the same base model, dtype and revision as the run (see resolved.yaml)",
            )
        for leg in legs(history.stretches(0, history.segments[-1].end_step)):
            self.store.apply(leg.plan, leg.noise)
        self.settle()

    def close_journal(self) -> None:
        """Make everything durable; no further step is recorded."""
        if self._durability is not None:
            self._durability.close()
            self._durability = None
        super().close_journal()

    def scheduled(self, step: int) -> tuple[float, float]:
        """(lr, eps) of a step."""
        config = self.config
        total = config.total_steps or step + 1
        lr = scheduled(
            float(config.lr),
            config.lr_schedule,
            step,
            total,
            warmup_steps=config.warmup_steps,
            final_ratio=config.final_ratio,
        )
        eps = scheduled(config.eps, config.eps_schedule, step, total, final_ratio=config.final_ratio)
        return lr, eps

    def _update(self, step: int, found: Verdict, lr: float) -> Update:
        if found.skip is not None:
            return Update(step, ())
        terms = terms_of(step, self._past.coefficients(found.coefficients), self.config.num_directions)
        return Update(step, terms, lr * self.config.weight_decay)

    def _agree(self, record: StepRecord) -> None:
        update = record.update
        payload = struct.pack("<qd?", update.step, update.decay, record.skip is None)
        payload += b"".join(struct.pack("<qqf", t.step, t.direction, t.coefficient) for t in update.terms)
        agree(self.channel, payload, f"step {update.step}")

    def _commit(self, record: StepRecord) -> bool:
        """Make a step durable on rank 0, and tell all; whether some rank wants to stop."""
        failure: ZODSError | None = None
        try:
            if self._durability is not None:
                self._durability.commit(record)
        except ZODSError as error:
            failure = error
        # Nobody applies a step before its record is on disk.
        votes = self.channel.all_gather(torch.tensor([failure is None, self._stop_requested()]))
        if failure is not None:
            raise failure
        if not all(bool(vote[0]) for vote in votes):
            raise PeerError("rank 0 could not write the journal", where=f"step {record.step}", remedy="see its log")
        return any(bool(vote[1]) for vote in votes)

    def _apply(self, record: StepRecord) -> None:
        if self._durability is not None:
            self._durability.before_apply()
        started, deferred = time.perf_counter(), self.store.deferred_seconds
        if record.skip is None:
            self.store.apply(Plan.of(self.config.run_seed, [record.update]))
            self.settle()
        self.steps_done += 1
        self._past.note(record)
        if self._durability is not None:
            # What was deferred belongs to an earlier step; it is the sum that counts.
            seconds = time.perf_counter() - started + deferred - self._deferred
            self._deferred = deferred
            self._durability.applied(record, seconds)


def decays(config: ZerothOrderConfig) -> bool:
    """Whether a schedule needs to know the length of the run."""
    return config.lr_schedule is not Schedule.CONSTANT or config.eps_schedule is not Schedule.CONSTANT
