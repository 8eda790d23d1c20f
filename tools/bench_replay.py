"""Times what makes a run last: journal, hash, snapshot and audit against a training step, and replay against memory.

    python tools/bench_replay.py [--json PATH] [--config RECIPE] [--replayed N] [--repeats N]

One process, the quickstart's model and data, medians. The floor of a replay is reading and writing every weight once
(a copy in place costs as much), however many steps are replayed; what lies above it is making the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import show, write_json

from zo_ds.config.load import load_config
from zo_ds.config.schema import JournalConfig
from zo_ds.engine.audit import BLOCK_ELEMENTS
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.initialize import initialize
from zo_ds.engine.resume import JOURNAL, Options, open_run
from zo_ds.journal.history import read_journal
from zo_ds.journal.snapshot import verify
from zo_ds.journal.stream import to_bytes
from zo_ds.maths.update import Term, Update
from zo_ds.ops.plan import Plan
from zo_ds.parallel.launched import open_channel
from zo_ds.tasks.batch import Batch
from zo_ds.trainer.environment import describe, use_threads
from zo_ds.trainer.job import check, encode_units, load, make_sampler, settle

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "journal_and_hash_share_of_step": ("<=", 0.01),
    "all_of_it_share_of_step": ("<=", 0.01),
    "replay_over_live": (">=", 10.0),
}


def seconds(job: Callable[[], object]) -> float:
    """How long a function takes."""
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def median(job: Callable[[], object], repeats: int) -> float:
    """Median time of a function."""
    return statistics.median(seconds(job) for _ in range(repeats))


def open_engine(config_path: Path) -> tuple[ZOEngine, Callable[[int], list[Batch]]]:
    """The recipe's engine, and what gives the batch of a step."""
    config = load_config(config_path)
    channel = open_channel(60.0)
    plan = check(config, channel)
    loaded, asking = load(plan)
    engine = initialize(loaded.module, config, loss_fn=asking.loss_fn, channel=channel, weights=loaded.source)
    settle(engine, asking, plan)
    sampler = make_sampler(config, plan.task, plan.splits, asking.learner)

    def batch(step: int) -> list[Batch]:
        examples = [plan.splits.train[index] for index in sampler.indices(step)]
        return encode_units(examples, config.training.micro_batch_size, asking.learner, engine.grid, engine.device)

    return engine, batch


def replay_seconds(engine: ZOEngine, steps: int, repeats: int) -> float:
    """Median time of one pass that replays so many steps (on weights that are then no longer used)."""
    count = engine.config.num_directions
    updates = [Update(s, tuple(Term(s, i, 1e-9 * (i + 1)) for i in range(count))) for s in range(steps)]
    plan = Plan.of(engine.config.run_seed, updates)
    return median(lambda: engine.store.apply(plan), repeats)


def measure(
    engine: ZOEngine, batch: Callable[[int], list[Batch]], folder: Path, replayed: int, repeats: int
) -> dict[str, float]:
    """All figures."""
    settings = JournalConfig(snapshot_replay_s=1e9)
    open_run(engine, folder, Options(settings, total_steps=1000))
    durability = engine.durability
    assert durability is not None
    engine.step(batch(0))
    step = statistics.median(engine.step(batch(engine.steps_done)).seconds for _ in range(repeats))
    record = read_journal(folder / JOURNAL).records()[-1]

    def append() -> None:
        journal = durability.journal
        assert journal is not None
        at = journal.next_step
        terms = tuple(Term(at, t.direction, t.coefficient) for t in record.update.terms)
        journal.append(type(record)(Update(at, terms), None, record.clean_loss, record.spread, 1))

    journal_s, hash_s = median(append, 50), median(engine.store.state_hash, 5)
    numel = sum(info.numel for info in engine.store.parameters.values())
    blocks = sum(-(-info.numel // BLOCK_ELEMENTS) for info in engine.store.parameters.values())

    def take_snapshot() -> None:
        durability.snapshot()
        durability.wait()

    snapshot = seconds(take_snapshot)
    check_s = seconds(lambda: verify(next((folder / "snapshots").glob("step-*"))))
    # A snapshot beside a step of the same batch: what the step takes longer, waiting included.
    alone = engine.step(batch(0)).seconds
    durability.snapshot()
    beside = engine.step(batch(0)).seconds
    durability.wait()
    copy = torch.empty(numel)
    floor = median(lambda: copy.mul_(1.0), repeats)
    one, many = replay_seconds(engine, 1, repeats), replay_seconds(engine, replayed, 2)
    directions = engine.config.num_directions
    audit_s = many / replayed * settings.audit_every / blocks + snapshot / blocks
    shares = journal_s + hash_s / settings.hash_every
    return {
        "step_s": step,
        "journal_append_ms": journal_s * 1e3,
        "state_hash_ms": hash_s * 1e3,
        "journal_and_hash_share_of_step": shares / step,
        "all_of_it_share_of_step": (shares + audit_s / settings.audit_every) / step,
        "snapshot_s": snapshot,
        "snapshot_check_s": check_s,
        "step_beside_a_snapshot_over_step": beside / alone,
        "update_s": one,
        f"replay_{replayed}_steps_s": many,
        "replay_per_step_over_update": many / replayed / one,
        "replay_over_live": step * replayed / many,
        "replay_1_step_over_floor": one / floor,
        f"replay_{replayed}_steps_over_floor": many / floor,
        "memory_floor_s": floor,
        "giga_parameters_steps_directions_per_s": numel * replayed * directions / many / 1e9,
        "shared_file_bytes_20_steps": float(len(to_bytes(read_journal(folder / JOURNAL), 0, 20))),
        "model_bytes": float(sum(info.numel * info.dtype.itemsize for info in engine.store.parameters.values())),
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--replayed", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    threads = use_threads("auto", 1)
    environment = describe(1, threads)
    engine, batch = open_engine(options.config)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(engine, batch, Path(folder), options.replayed, options.repeats)
        engine.close()
    print(json.dumps(environment, indent=2) + "\n")
    show(found, TARGETS)
    write_json(options.json, {**found, "environment": environment})


if __name__ == "__main__":
    main()
