"""Runs that are killed again and again, held against the run that nobody killed."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.launch import jobs
from tests.launch.zygote import Start, Zygote
from zo_ds.errors import CorruptRunError
from zo_ds.journal.history import read_journal
from zo_ds.journal.snapshot import committed, verify

STORES: dict[str, dict[str, Any]] = {
    "resident": {},
    "zero3-offload": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
}
_STEP = re.compile(r"^step +(\d+)/\d+ \| loss (\S+) \|", re.MULTILINE)
_TIMES = {"wall_s", "starts", "peak_rss_gib"}
_MEASURED = ("step", "loss", "spread", "coefficient_rms", "lr", "eps", "skip")
_LIFE_S, _KILLED = 120.0, -9
WHEN = ("before", "in", "behind")
"""Where in a run a kill fell: the first step was not durable yet, steps were being taken, all were durable."""


@dataclass(frozen=True)
class Job:
    """A recipe, and what its run gives if nobody disturbs it.

    Attributes:
        store: where the weights are, a key of `STORES`.
        recipe: its file.
        expected: see `outcome`.
        model: bytes of the model's weights.
        seconds: that the run takes.
    """

    store: str
    recipe: Path
    expected: Mapping[str, Any]
    model: bytes
    seconds: float

    def start(self, folder: Path, **how: Any) -> Start:
        """The command that begins the run in a folder, or goes on with it; `how`: see `Start`."""
        folder.mkdir(exist_ok=True)
        for name in ("out.txt", "err.txt"):
            (folder / name).touch()  # a process may die before it gets so far
        return Start(["train", str(self.recipe), "output.run_dir=run"], folder, **how)


def make_jobs(zygotes: Sequence[Zygote], folder: Path, steps: int, eval_every: int, lr: float) -> list[Job]:
    """One job for each store, each run twice by a zygote of its own; snapshots and hashes come as often as can be."""
    recipes = []
    for store, deepspeed in STORES.items():
        (folder / store).mkdir()
        recipe = jobs.make_recipe(
            folder / store,
            training={"steps": steps, "eval_every": eval_every, "batch_size": 4},
            zeroth_order={"lr": lr},
            journal={"snapshot_replay_s": 1e-9, "hash_every": 3, "audit_every": 5},
            deepspeed=deepspeed,
        )
        recipes.append((store, recipe))
    with ThreadPoolExecutor(len(recipes)) as pool:
        return list(pool.map(lambda zygote, named: _undisturbed(zygote, *named), zygotes, recipes))


def _undisturbed(zygote: Zygote, store: str, recipe: Path) -> Job:
    job = Job(store, recipe, {}, b"", 0.0)
    for name in ("once", "again"):
        home = recipe.parent / name
        begun = time.monotonic()
        code = zygote.run(job.start(home))
        seconds = time.monotonic() - begun  # the second time: the first one finds cold caches
        if code != 0:
            raise RuntimeError(f"undisturbed, {home} ends with {code}: {(home / 'err.txt').read_text()}")
        wrong = differences(job, home / "run")
        if wrong:
            raise RuntimeError(f"undisturbed, {home} gives something else than before: {wrong}")
        job = Job(store, recipe, outcome(home / "run"), weights(home / "run"), seconds)
    return job


def outcome(run: Path) -> dict[str, Any]:
    """All of a finished run that may not depend on how often it was killed."""
    state = json.loads((run / "state.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {(r["kind"], r["step"], r["accuracy"], r["loss"]) for r in rows if r["kind"] in ("dev", "test")}
    return {
        "result": {key: value for key, value in jobs.result(run).items() if key not in _TIMES},
        "records": jobs.records(run),
        "dev scores": state["dev"],
        "zero-shot score": state["zero_shot"],
        "train rows of metrics.jsonl": [[row[key] for key in _MEASURED] for row in rows if row["kind"] == "train"],
        "scores in metrics.jsonl": sorted(scores),
        "note of the model": (run / "model" / "zo_ds.json").read_text(),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if _leftover(path)),
    }


def weights(run: Path) -> bytes:
    """Of the model that the run kept."""
    return (run / "model" / "model.safetensors").read_bytes()


def differences(job: Job, run: Path) -> list[str]:
    """What of a finished run is not as it would be without the kills."""
    found = outcome(run)
    return [f"{key}: {_first(value, found[key])}" for key, value in job.expected.items() if value != found[key]]


def different_bits(expected: bytes, found: bytes) -> int:
    """How many; a length that differs counts in full."""
    if len(expected) != len(found):
        return 8 * abs(len(expected) - len(found))
    return int(np.unpackbits(np.frombuffer(expected, np.uint8) ^ np.frombuffer(found, np.uint8)).sum())


def _leftover(path: Path) -> bool:
    return path.name.endswith((".tmp", ".old")) or ".damaged" in path.name


def _first(expected: Any, found: Any) -> str:
    """Where two values part."""
    if isinstance(expected, dict) and isinstance(found, dict):
        key = next(key for key in [*expected, *found] if expected.get(key) != found.get(key))
        return f"{key}: {_first(expected.get(key), found.get(key))}"
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip(expected, found, strict=False)
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
        ours, theirs = (_first(None, values[at]) if at < len(values) else "nothing" for values in (expected, found))
        return f"{len(expected)} expected, {len(found)} found; number {at}: {ours} expected, {theirs} found"
    return repr(found) if expected is None else f"{expected!r} expected, {found!r} found"


class Watch:
    """What a run has promised so far, held against what is there after each life.

    Args:
        folder: that it runs in.
    """

    def __init__(self, folder: Path) -> None:
        self.lost = 0
        self.problems: list[str] = []
        self.records: list[dict[str, Any]] = []
        self._folder, self._run = folder, folder / "run"
        self._dev: dict[str, Any] = {}

    def look(self) -> None:
        """Look at what the last life left; nothing may be writing there."""
        before, self.records = self.records, self._journal()
        gone = {record["step"] for n, record in enumerate(before) if self.records[n : n + 1] != [record]}
        told = {int(step) - 1: loss for step, loss in _STEP.findall((self._folder / "out.txt").read_text())}
        gone |= {n for n in told if n >= len(self.records)}
        if gone:
            self._complain(f"steps {sorted(gone)} were durable and are gone")
        self.lost += len(gone)
        for step, loss in told.items():
            if step < len(self.records) and f"{self.records[step]['clean_loss']:.4f}" != loss:
                self._complain(f"step {step} was printed with loss {loss}")
        self._look_at_scores()
        for snapshot in committed(self._run / "snapshots"):
            try:
                verify(snapshot)
            except CorruptRunError as error:
                self._complain(str(error))

    def _journal(self) -> list[dict[str, Any]]:
        if not list((self._run / "journal").glob("*.zoj")):
            return []
        history = read_journal(self._run / "journal")
        if not history.whole:
            self._complain(f"the journal is damaged: {'; '.join(history.problems)}")
        return [record.to_json() for record in history.records()]

    def _look_at_scores(self) -> None:
        state = self._run / "state.json"
        found = json.loads(state.read_text())["dev"] if state.exists() else {}
        if any(found.get(step) != score for step, score in self._dev.items()):
            self._complain(f"dev scores {self._dev} became {found}")
        if any(int(step) > len(self.records) for step in found):
            self._complain(f"dev scores {list(found)} with {len(self.records)} steps")
        self._dev = found

    def _complain(self, text: str) -> None:
        self.problems.append(f"{self._folder.name}: {text}")


@dataclass
class Storm:
    """What came of it.

    Attributes:
        kills: of processes that were running.
        starts, runs: so many, finished.
        lost: steps that had been durable.
        bits: of kept models that differ from those of undisturbed runs.
        problems: all that is wrong, in words.
        when: how many kills fell where, see `WHEN`.
    """

    kills: int = 0
    starts: int = 0
    runs: int = 0
    lost: int = 0
    bits: int = 0
    problems: list[str] = field(default_factory=list)
    when: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHEN, 0))


def storm(
    zygotes: Sequence[Zygote],
    made: Sequence[Job],
    folder: Path,
    kills: int,
    seed: int,
    progress: Callable[[Storm], None] = lambda so_far: None,
) -> Storm:
    """Kill runs at random moments until there were so many kills; each run goes on until it is done.

    Args:
        zygotes: start the runs, each those of one job, at the same time.
        made: the jobs.
        folder: for the runs; those that went well are removed.
        kills: how many, shared out evenly.
        seed: of the moments.
        progress: called after every kill, with what came of all jobs so far.
    """
    found, lock = Storm(), threading.Lock()
    shares = [(kills + n) // len(made) for n in range(len(made))]
    with ThreadPoolExecutor(len(made)) as pool:
        futures = [
            pool.submit(_kill, zygote, job, folder, share, random.Random(f"{seed} {job.store}"), found, lock, progress)
            for zygote, job, share in zip(zygotes, made, shares, strict=True)
        ]
        for future in futures:
            future.result()
    return found


def _kill(
    zygote: Zygote,
    job: Job,
    folder: Path,
    kills: int,
    draw: random.Random,
    found: Storm,
    lock: threading.Lock,
    progress: Callable[[Storm], None],
) -> None:
    done = runs = 0
    while done < kills:
        home, code = folder / f"{job.store}-{runs:04d}", _KILLED
        watch = Watch(home)
        while code == _KILLED:
            life = zygote.start(job.start(home))
            ended = life.wait(draw.uniform(0, job.seconds) if done < kills else _LIFE_S)
            if ended is None:
                life.kill()
                ended = life.wait(_LIFE_S)
            code = -1 if ended is None else ended
            watch.look()
            with lock:
                found.starts += 1
                if code == _KILLED:
                    done += 1
                    found.kills += 1
                    steps, total = len(watch.records), len(job.expected["records"])
                    found.when[WHEN[bool(steps) + (steps == total)]] += 1
                    progress(found)
        runs += 1
        wrong = _judge(job, home, watch, code)
        with lock:
            found.runs += 1
            found.lost += watch.lost
            found.problems += wrong
            if code == 0:
                found.bits += different_bits(job.model, weights(home / "run"))
        if not wrong:
            shutil.rmtree(home)


def _judge(job: Job, home: Path, watch: Watch, code: int) -> list[str]:
    if code != 0:
        return [*watch.problems, f"{home.name}: exit code {code}: {(home / 'err.txt').read_text()[-500:]}"]
    return [*watch.problems, *(f"{home.name}: {difference}" for difference in differences(job, home / "run"))]
