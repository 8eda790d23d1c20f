"""Open or continue the journal of a run: every rank brings its own weights to the last durable step, by replay.

Nothing but scalars crosses: a rank that was replaced, or cannot see the run directory, starts from the base model.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zo_ds.config.schema import JournalConfig
from zo_ds.engine.durability import Durability
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.past import Earlier, earlier, reach, settings
from zo_ds.errors import ConfigError, CorruptRunError
from zo_ds.journal.history import History, Stretch, read_journal
from zo_ds.journal.journal import Journal
from zo_ds.journal.lock import RunLock
from zo_ds.journal.records import Header
from zo_ds.journal.recovery import Start, choose_start, drop_later
from zo_ds.journal.replay import legs
from zo_ds.journal.snapshot import purge, quarantine, read_info
from zo_ds.journal.stream import from_bytes, to_bytes
from zo_ds.maths.estimators import SkipReason
from zo_ds.parallel.channel import agree, on_rank_0
from zo_ds.parallel.layout import agreed_total
from zo_ds.tensor_files import folder_files
from zo_ds.version import VERSION

JOURNAL = "journal"
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Resumed:
    """How a run was opened.

    Attributes:
        step: steps that are done.
        snapshot: the one that it went on from, None for the base model.
        replayed: steps that were replayed on this rank.
        seconds: that the replay took.
        changed: constants of the estimator that are others from this step on.
    """

    step: int
    snapshot: Path | None
    replayed: int
    seconds: float
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to open a run.

    Attributes:
        settings: of the journal.
        total_steps: length of the run, if it is known.
        base_model: where the base weights come from, kept in the journal.
        fork: go on although the constants of the estimator differ from those of the run so far.
        extras: writes the model's configuration and tokenizer beside the weights of a snapshot.
        warn: told what was damaged.
        patience: entered while something may take as long as setting up.
    """

    settings: JournalConfig = field(default_factory=JournalConfig)
    total_steps: int | None = None
    base_model: Mapping[str, Any] | None = None
    fork: bool = False
    extras: Callable[[Path], None] | None = None
    warn: Callable[[str], None] = lambda text: None
    patience: Callable[[], AbstractContextManager[None]] = nullcontext


def open_run(engine: ZOEngine, run_dir: Path, options: Options | None = None) -> Resumed:
    """Journal an engine in a run directory from now on; if the directory holds a run, go on with it. Collective.

    Args:
        engine: at its base weights.
        run_dir: rank 0 writes there; other ranks read snapshots if they see it.
        options: see there.

    Raises:
        ConfigError: the run in the directory has other constants, and `fork` is off.
        CorruptRunError: the run cannot be read, or started from other weights.
        MachineError: the journal cannot be written.
        PeerError: ranks end up with different weights.
    """
    options = options or Options()
    base = engine.digest()
    agree(engine.channel, base.encode(), "the base weights")
    found = on_rank_0(engine.channel, lambda: _find(engine, run_dir, base, options))
    plan = _Plan(**json.loads(engine.channel.broadcast(json.dumps(asdict(found[0])).encode() if found else b"")))
    resumed, stretches = Resumed(0, None, 0, 0.0), list[Stretch]()
    if plan.resumed:
        start, history = _tell(engine, run_dir, plan, found[1] if found else None)
        resumed, stretches = _catch_up(engine, start, history, options)
        resumed = replace(resumed, changed=tuple(plan.changed))
        past = [Earlier(tuple(coefficients), spread) for coefficients, spread in plan.past]
        if plan.lr is not None and engine.found_lr is not None:
            # Neither a longer run nor another measurement changes what was begun.
            engine.take_lr(plan.lr)
        engine.went_on(plan.end, [SkipReason(reason) for reason in plan.skips], past)
    engine.settle()
    agreed_total(engine.channel, engine.layout, engine.store.state_hash(), f"the weights after step {plan.end}")
    journal = on_rank_0(
        engine.channel, lambda: _open_journal(engine, run_dir, base, plan, found[1] if found else None, options)
    )
    engine.record_to(
        Durability(
            engine.store,
            engine.channel,
            engine.layout,
            options.settings,
            journal,
            run_dir / SNAPSHOTS,
            newest=resumed.snapshot,
            since=stretches,
            replay_s=resumed.seconds,
            extras=options.extras,
            warn=options.warn,
            patience=options.patience,
        )
    )
    return resumed


def open_own_run(engine: ZOEngine, run_dir: Path, options: Options) -> Resumed:
    """`open_run` for a script that has no run directory of `zo_ds train`: the directory is locked, warnings are logged.

    Raises:
        MachineError: another process writes there.
        ZODSError: see `open_run`.
    """
    on_rank_0(engine.channel, lambda: engine.at_close(RunLock(run_dir).release))
    try:
        return open_run(engine, run_dir, replace(options, warn=logging.getLogger("zo_ds").warning))
    except BaseException:
        engine.close_journal()
        raise


@dataclass(frozen=True)
class _Plan:
    """What rank 0 found and decided.

    Attributes:
        resumed: there is a run to go on with.
        step, snapshot, end: see `Start`.
        skips: why the last steps before `end` were skipped, if they were.
        past: the fields of an `Earlier` for each step before `end` that the next one looks back on.
        changed: see `Resumed`.
        lr: how the run found its learning rate, if it was given none.
    """

    resumed: bool = False
    step: int = 0
    snapshot: str | None = None
    end: int = 0
    skips: tuple[str, ...] = ()
    past: tuple[tuple[tuple[float, ...], float | None], ...] = ()
    changed: tuple[str, ...] = ()
    lr: Mapping[str, Any] | None = None


def _find(engine: ZOEngine, run_dir: Path, base: str, options: Options) -> tuple[_Plan, History | None]:
    if not any((run_dir / JOURNAL).glob("*.zoj")):
        return _Plan(), None
    history = read_journal(run_dir / JOURNAL)
    header = _header(engine, base, options)
    changed = _check_identity(history, header, options)
    start = choose_start(history, run_dir / SNAPSHOTS, options.warn)
    for problem in () if history.whole else history.problems:
        options.warn(f"the journal is damaged: {problem}; going on from what is sound, step {start.end}")
    snapshot = str(start.snapshot.absolute()) if start.snapshot else None
    skips = tuple(reason.value for reason in history.skips_before(start.end))
    past = _past(engine, header, history, start, options)
    lr = None if changed else history.segments[-1].header.lr
    return _Plan(True, start.step, snapshot, start.end, skips, past, changed, lr), history


def _past(
    engine: ZOEngine, header: Header, history: History, start: Start, options: Options
) -> tuple[tuple[tuple[float, ...], float | None], ...]:
    records, whole = history.before_the_end(start.step, reach(engine.config), header.maths())
    if not whole:
        options.warn(
            f"the journal is damaged before step {start.end - len(records)}: the next steps do not look back further"
        )
    steps = [earlier(record, header.num_directions) for record in records]
    return tuple((step.coefficients, step.spread) for step in steps)


def _tell(engine: ZOEngine, run_dir: Path, plan: _Plan, history: History | None) -> tuple[Start, History]:
    """Send every rank the records it needs; where this rank starts."""
    sees = plan.snapshot is None or _usable(Path(plan.snapshot), plan.step)
    everybody = all(bool(flag) for flag in engine.channel.all_gather(torch.tensor([sees])))

    def encode() -> bytes:
        assert history is not None
        first = plan.step if everybody else 0
        if history.end_of(first) != plan.end:
            raise CorruptRunError(
                "a rank cannot see the snapshot that the run must go on from",
                where=str(plan.snapshot),
                why="; ".join(history.problems),
                remedy="put the run directory on a file system that all nodes share",
            )
        return to_bytes(history, first, plan.end)

    raw = engine.channel.broadcast(on_rank_0(engine.channel, encode) or b"")
    snapshot = Path(plan.snapshot) if plan.snapshot is not None and sees else None
    if engine.layout.size > 1 and not everybody:
        snapshot = None  # the ranks of a replica must do the same
    start = Start(plan.step if snapshot is not None else 0, snapshot, plan.end)
    return start, history or from_bytes(raw, str(run_dir / JOURNAL))


def _usable(snapshot: Path, step: int) -> bool:
    try:
        return read_info(snapshot).step == step
    except CorruptRunError:
        return False


def _catch_up(engine: ZOEngine, start: Start, history: History, options: Options) -> tuple[Resumed, list[Stretch]]:
    if start.snapshot is not None:
        engine.load_weights(folder_files(start.snapshot).read)
        if _hash(engine) != read_info(start.snapshot).state_hash:
            aside = quarantine(start.snapshot) if engine.channel.rank == 0 else start.snapshot
            raise CorruptRunError(
                "the weights of a snapshot are not those that it was made of",
                where=str(aside),
                why="its state hash is another: memory was damaged while it was written",
                remedy="the same command goes on from an older one, or from the base model",
            )
    begun = time.perf_counter()
    stretches = history.stretches(start.step, start.end)
    records = [record for stretch in stretches for record in stretch.records]
    hashes = {record.step: record.state_hash for record in records if record.state_hash is not None}
    last = max(hashes, default=None)
    for leg in legs(stretches, () if last is None else (last,)):
        if leg.hash_step is not None and _hash(engine) != hashes[leg.hash_step]:
            options.warn(
                f"the weights before step {leg.hash_step} had another state hash while the run ran than replay gives: "
                "they were damaged in memory then; going on from the replayed ones"
            )
        engine.store.apply(leg.plan, leg.noise)
    return Resumed(start.end, start.snapshot, len(records), time.perf_counter() - begun), stretches


def _hash(engine: ZOEngine) -> int:
    """Of this rank's replica; collective only if others hold parts of it, and all ranks do the same then."""
    if engine.layout.size == 1:
        return engine.store.state_hash()
    engine.settle()
    return agreed_total(engine.channel, engine.layout, engine.store.state_hash(), "the weights while replaying")


def _open_journal(
    engine: ZOEngine, run_dir: Path, base: str, plan: _Plan, history: History | None, options: Options
) -> Journal:
    header = _header(engine, base, options)
    settings = options.settings
    if history is None:
        return Journal.create(run_dir / JOURNAL, header, options.total_steps, settings.sync_every)
    drop_later(run_dir / SNAPSHOTS, plan.end, options.warn)
    for problem in purge(run_dir / SNAPSHOTS, settings.keep_snapshots):
        options.warn(f"an old snapshot stays: {problem}")
    journal = Journal.reopen(run_dir / JOURNAL, history, plan.step, options.total_steps, settings.sync_every)
    if header.maths() != journal.header.maths() or header.lr not in (None, journal.header.lr):
        journal.rotate(header)
    return journal


def _header(engine: ZOEngine, base: str, options: Options) -> Header:
    config = engine.config
    return Header(
        run_id=uuid.uuid4().hex,
        run_seed=config.run_seed,
        noise=engine.store.structure,
        estimator=config.estimator.value,
        num_directions=config.num_directions,
        coefficient_cap=config.coefficient_cap,
        base_sha256=base,
        parameters=tuple(engine.store.parameters.values()),
        zo_ds=VERSION,
        base_model=options.base_model,
        window=config.window,
        past=settings(config),
        lr=engine.found_lr,
    )


def _check_identity(history: History, header: Header, options: Options) -> tuple[str, ...]:
    run = history.segments[-1].header
    if run.base_sha256 != header.base_sha256 or run.parameters != header.parameters:
        names = {p.name for p in run.parameters} ^ {p.name for p in header.parameters}
        raise CorruptRunError(
            "the run in this directory started from other weights",
            where=str(history.path),
            why=f"trained parameters that differ: {', '.join(sorted(names)[:3]) or 'their values or shapes'}",
            remedy="give the same model, dtype and revision (see resolved.yaml), or choose another run_dir",
        )
    now = header.maths()
    changed = tuple(f"{key}: {value} -> {now[key]}" for key, value in run.maths().items() if value != now[key])
    if changed and not options.fork:
        raise ConfigError(
            "the run in this directory was made with other mathematics",
            where=str(history.path),
            why="; ".join(changed),
            remedy="undo the change, choose another run_dir, or continue with it on purpose: resume=fork",
        )
    return changed
