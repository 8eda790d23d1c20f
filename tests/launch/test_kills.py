"""A run that is killed, at whatever instruction and however often, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch import jobs
from tests.launch.storm import Job, Watch, differences, different_bits, make_jobs, storm, weights
from tests.launch.zygote import Life, Point, Zygote
from zo_ds.trainer.health import _ECHO_S as ECHO_S
from zo_ds.trainer.health import GRACE_S

pytestmark = pytest.mark.launch

KILLS = 100
SPREAD = 25
"""So many calls of a function of the operating system, spread over the run, are not survived."""


def around(function: str, inside: str = "", about: str = "") -> list[Point]:
    return [Point(function, after, inside, about) for after in (False, True)]


ENGINE, JOURNAL, SNAPSHOT = "zo_ds.engine.engine.ZOEngine", "zo_ds.journal.journal", "zo_ds.journal.snapshot"
MEASURE = "zo_ds.engine.measure.Measurement.run"
APPEND, ROTATE, SEGMENT = f"{JOURNAL}.Journal.append", f"{JOURNAL}.Journal.rotate", f"{JOURNAL}._new_segment"
WRITE_SNAPSHOT, SHARDS = "zo_ds.engine.snapshots.write_snapshot", "zo_ds.stores.shards"
SESSION, RUN_DIR = "zo_ds.trainer.session.Session", "zo_ds.trainer.run_dir"

FIRST_LIFE = [
    # A step: losses, agreement, record, vote, update.
    *around(MEASURE),
    *around(f"{ENGINE}._agree"),
    *around(APPEND),
    *around(f"{JOURNAL}.write_all", inside=APPEND),
    Point(f"{JOURNAL}.sync_handle", after=True, inside=APPEND),
    *around(f"{ENGINE}._commit"),
    Point("zo_ds.parallel.channel.SoloChannel.all_gather", inside=f"{ENGINE}._commit"),
    *around(f"{ENGINE}._apply"),
    *around("zo_ds.engine.durability.Durability.applied"),
    *around("zo_ds.trainer.report.Progress.step"),
    Point("zo_ds.trainer.report.Progress._emit", after=True),
    *around("zo_ds.stores.base.WeightStore.state_hash"),
    # A new segment.
    *around(ROTATE),
    *around("os.replace", inside=SEGMENT),
    Point(SEGMENT, after=True, inside=ROTATE),
    *around(f"{JOURNAL}.Journal._trim"),
    Point("os.ftruncate", after=True),
    # A snapshot: read, written, named, committed; older ones go.
    *around("zo_ds.engine.snapshots.SnapshotWriter.start"),
    Point(f"{SNAPSHOT}.remove_folder", after=True, inside=WRITE_SNAPSHOT),
    *around(f"{SHARDS}._write_shard", inside=WRITE_SNAPSHOT),
    Point(f"{SHARDS}.write_all", after=True, inside=WRITE_SNAPSHOT),
    Point("threading.Event.set", inside=WRITE_SNAPSHOT),
    *around(f"{SNAPSHOT}.write_weights"),
    *around("zo_ds.trainer.zeroth_order.write_extras"),
    *around("os.replace", inside=WRITE_SNAPSHOT, about="manifest.json"),
    Point(f"{SNAPSHOT}.write_atomically", after=True, about="manifest.json"),
    *around("os.replace", inside=WRITE_SNAPSHOT, about="/snapshots/step-"),
    *around("os.replace", inside=WRITE_SNAPSHOT, about="COMMIT"),
    Point(f"{SNAPSHOT}.write_atomically", after=True, about="COMMIT"),
    *around("pathlib.Path.unlink", about="COMMIT"),
    Point("pathlib.Path.unlink", after=True, about="/snapshots/step-"),
    Point("pathlib.Path.rmdir", about="/snapshots/step-"),
    # An evaluation: score, model, state.
    *around(f"{SESSION}.score_base"),
    *around("zo_ds.trainer.session.evaluate"),
    *around(f"{SESSION}._save_model"),
    *around("zo_ds.engine.export._fill"),
    *around("os.replace", about=".model.tmp"),
    *around("os.replace", about=".model.old"),
    *around("zo_ds.files.discard", about=".model.old"),
    *around("os.replace", about="/.state.json"),
    *around(f"{SESSION}._keep_state"),
    # The beginning and the end.
    *around("zo_ds.journal.lock.RunLock.__init__"),
    *around(f"{RUN_DIR}.RunDir.explain"),
    *around("os.replace", about="/.resolved.yaml"),
    *around("os.replace", about="/.env.json"),
    *around(f"{JOURNAL}.Journal.create"),
    *around("os.replace", about="/journal/000000"),
    *around(f"{SESSION}._return_to"),
    *around(f"{SESSION}._result"),
    *around("zo_ds.engine.durability.Durability.close"),
    *around(f"{ENGINE}.close"),
    *around("os.replace", about="/.result.json"),
    Point(f"{RUN_DIR}.RunDir.close"),
]
SECOND_LIFE = [
    *around("zo_ds.trainer.opening._look"),
    *around(f"{RUN_DIR}.RunDir.explain"),
    *around("os.replace", about="/.state.json"),
    *around("zo_ds.trainer.zeroth_order.open_run"),
    Point("zo_ds.engine.resume.choose_start", after=True),
    Point("zo_ds.engine.resume.folder_files", after=True),
    *around(f"{ENGINE}.went_on"),
    *around("zo_ds.engine.resume.drop_later"),
    *around(f"{JOURNAL}.Journal.reopen"),
    Point(f"{JOURNAL}.reserve", after=True, inside=f"{JOURNAL}.Journal.reopen"),
    *around("zo_ds.trainer.report._drop_rows"),
    *around("os.replace", about="/.metrics.jsonl"),
    *around(f"{SESSION}.run"),
    *around(APPEND),
]
SYSTEM = [f"os.{name}" for name in ("fsync", "replace", "pwrite")]


@pytest.fixture(scope="module")
def zygotes() -> Iterator[list[Zygote]]:
    """One for each core that CI has."""
    with Zygote(jobs.environment()) as one, Zygote(jobs.environment()) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def zygote(zygotes: list[Zygote]) -> Zygote:
    return zygotes[0]


@pytest.fixture(scope="module")
def long(zygotes: list[Zygote], tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """A run of each store whose best model is not its last one."""
    found = make_jobs(zygotes, tmp_path_factory.mktemp("long"), steps=60, eval_every=10, lr=0.02)
    assert [0 < job.expected["result"]["best_step"] < 60 for job in found] == [True, True]
    return found


@pytest.fixture(scope="module")
def short(zygotes: list[Zygote], tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    found = make_jobs(zygotes, tmp_path_factory.mktemp("short"), steps=16, eval_every=4, lr=0.04)
    assert [0 < job.expected["result"]["best_step"] < 16 for job in found] == [True, True]
    return found


@pytest.fixture(scope="module")
def counts(zygote: Zygote, short: list[Job], tmp_path_factory: pytest.TempPathFactory) -> list[dict[Point, int]]:
    """How often every moment comes in a run, for each store."""
    points = [*FIRST_LIFE, *map(Point, SYSTEM)]
    found = []
    for job in short:
        home = tmp_path_factory.mktemp("counts")
        code = zygote.run(job.start(home, count=points))
        assert code == 0, (home / "err.txt").read_text()
        found.append(dict(zip(points, json.loads((home / "counts.json").read_text()), strict=True)))
    return found


def assert_as_if_nothing_had_happened(zygote: Zygote, job: Job, home: Path, watch: Watch) -> None:
    """Let the run go on to its end."""
    watch.look()
    code = zygote.run(job.start(home))
    assert code == 0, (home / "err.txt").read_text()[-1000:]
    watch.look()
    assert watch.problems == []
    assert different_bits(job.model, weights(home / "run")) == 0
    assert differences(job, home / "run") == []


def test_kills_at_random_moments(zygotes: list[Zygote], long: list[Job], tmp_path: Path) -> None:
    found = storm(zygotes, long, tmp_path, KILLS, seed=0)
    assert (found.kills, found.lost, found.bits) == (KILLS, 0, 0)
    assert found.problems == []
    assert all(found.when.values()), found.when


@pytest.mark.parametrize("point", FIRST_LIFE, ids=str)
def test_crash_point(
    zygotes: list[Zygote], short: list[Job], counts: list[dict[Point, int]], tmp_path: Path, point: Point
) -> None:
    """Early with one store, late with the other."""

    def crash(side: int) -> None:
        zygote, job, count = zygotes[side], short[side], counts[side][point]
        assert count > 0
        # How many snapshots there are depends on how fast they are written: not the very last ones.
        call = max(1, count * 2 // 3) if side else 1
        home = tmp_path / job.store
        assert zygote.run(job.start(home, crash=(point, call))) == -signal.SIGKILL
        assert_as_if_nothing_had_happened(zygote, job, home, Watch(home))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(crash, range(2)))


@pytest.mark.parametrize("point", SECOND_LIFE, ids=str)
def test_crash_point_of_a_life_that_goes_on(zygote: Zygote, short: list[Job], tmp_path: Path, point: Point) -> None:
    job, watch = short[SECOND_LIFE.index(point) % 2], Watch(tmp_path)
    for crash in ((Point(MEASURE), 9), (point, 1)):
        assert zygote.run(job.start(tmp_path, crash=crash)) == -signal.SIGKILL
        watch.look()
    assert_as_if_nothing_had_happened(zygote, job, tmp_path, watch)


def test_a_snapshot_that_was_never_finished_goes(zygote: Zygote, short: list[Job], tmp_path: Path) -> None:
    """Its writer hangs while the run goes on to its end, so that no later one can clear it away."""
    pause, end = Point("threading.Event.set", True, WRITE_SNAPSHOT), Point(f"{SESSION}._return_to")
    assert zygote.run(short[0].start(tmp_path, pause=(pause, 1), crash=(end, 1))) == -signal.SIGKILL
    assert list((tmp_path / "run" / "snapshots").glob(".*.tmp"))
    assert_as_if_nothing_had_happened(zygote, short[0], tmp_path, Watch(tmp_path))


def test_the_snapshot_that_a_run_goes_on_from_is_left_alone(zygote: Zygote, short: list[Job], tmp_path: Path) -> None:
    """Killed when the snapshot before a step is whole and the step's record is not written."""
    pause = Point(MEASURE)
    end = Point(f"{SNAPSHOT}.write_atomically", after=True, about="step-00000003/COMMIT")
    assert zygote.run(short[0].start(tmp_path, pause=(pause, 4), crash=(end, 1))) == -signal.SIGKILL
    assert_as_if_nothing_had_happened(zygote, short[0], tmp_path, Watch(tmp_path))


def test_a_first_snapshot_that_fails_does_not_stop_a_run(zygote: Zygote, short: list[Job], tmp_path: Path) -> None:
    """The run goes on where a snapshot is due, the disk refuses that one, and an audit follows."""
    job, refused = short[0], tmp_path / "run" / "snapshots" / ".step-00000006.tmp"
    start = job.start(tmp_path, crash=(Point("zo_ds.engine.durability.Durability.state_hash"), 7))
    start = replace(start, arguments=[*start.arguments, "journal.audit_every=4"])
    assert zygote.run(start) == -signal.SIGKILL
    refused.touch()
    code = zygote.run(replace(start, crash=None))
    assert "no snapshot: File exists" in (tmp_path / "out.txt").read_text()
    assert code == 0, (tmp_path / "err.txt").read_text()[-300:]
    refused.unlink()
    assert differences(job, tmp_path / "run") == []


@pytest.mark.parametrize("function", SYSTEM)
def test_crash_at_calls_of_the_system(
    zygotes: list[Zygote], short: list[Job], counts: list[dict[Point, int]], tmp_path: Path, function: str
) -> None:
    count = min(of_store[Point(function)] for of_store in counts)
    calls = [1 + n * (count - 1) // (SPREAD - 1) for n in range(SPREAD)]
    assert len(set(calls)) == SPREAD

    def crash(number: int) -> bool:
        side, turn = number % 2, number // 2
        home = tmp_path / str(calls[number])
        point = Point(function, after=turn % 2 == 1)
        code = zygotes[side].run(short[side].start(home, crash=(point, calls[number])))
        assert code in (0, -signal.SIGKILL)  # fewer snapshots, fewer calls
        assert_as_if_nothing_had_happened(zygotes[side], short[side], home, Watch(home))
        return code != 0

    with ThreadPoolExecutor(2) as pool:
        sides = [pool.submit(lambda s=side: [crash(n) for n in range(s, SPREAD, 2)]) for side in (0, 1)]
        assert sum(sum(side.result()) for side in sides) >= SPREAD - 5


def until(true: Callable[[], bool], life: Life) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert life.wait(0.002) is None, "the run has ended"
        assert time.monotonic() < deadline


def holds(file: Path, text: str) -> Callable[[], bool]:
    return lambda: file.exists() and text in file.read_text()


@pytest.mark.parametrize("seed", range(10))
def test_a_signal_stops_a_run_after_its_step(zygote: Zygote, long: list[Job], tmp_path: Path, seed: int) -> None:
    draw, job = random.Random(seed), long[seed % 2]
    number = (signal.SIGTERM, signal.SIGINT)[seed // 2 % 2]
    life = zygote.start(job.start(tmp_path))
    until(holds(tmp_path / "out.txt", draw.choice(["zero-shot", *(f"step {n:2}/60" for n in range(1, 50))])), life)
    assert life.wait(draw.uniform(0, 0.02)) is None
    begun = time.monotonic()
    life.kill(number)
    assert life.wait(GRACE_S) == 75
    assert time.monotonic() - begun < GRACE_S
    assert f"{number.name}: finishing this step" in (tmp_path / "out.txt").read_text()
    said = (tmp_path / "err.txt").read_text()
    assert "zo_ds: stopped" in said
    assert "the same command goes on" in said
    assert_as_if_nothing_had_happened(zygote, job, tmp_path, Watch(tmp_path))


@pytest.mark.parametrize("seed", range(6))
def test_a_signal_while_a_run_is_set_up(zygote: Zygote, short: list[Job], tmp_path: Path, seed: int) -> None:
    job = short[seed % 2]
    life = zygote.start(job.start(tmp_path))
    assert life.wait(random.Random(seed).uniform(0, 0.15)) is None
    life.kill((signal.SIGTERM, signal.SIGINT)[seed // 2 % 2])
    assert life.wait(GRACE_S) not in (None, 0)
    assert_as_if_nothing_had_happened(zygote, job, tmp_path, Watch(tmp_path))


def hanging(zygote: Zygote, job: Job, home: Path, grace: float) -> Life:
    """A run that hangs in its sixth step and has been told to stop."""
    point = Point(MEASURE)
    life = zygote.start(job.start(home, pause=(point, 6), constants={"zo_ds.trainer.health.GRACE_S": grace}))
    until((home / "paused").exists, life)
    life.kill(signal.SIGTERM)
    until(holds(home / "out.txt", "finishing this step"), life)
    return life


def test_a_second_signal_stops_at_once(zygote: Zygote, short: list[Job], tmp_path: Path) -> None:
    """Unless it follows so soon that a launcher may have passed on the first one."""
    life = hanging(zygote, short[0], tmp_path, grace=60)
    life.kill(signal.SIGTERM)
    assert life.wait(ECHO_S + 0.5) is None
    life.kill(signal.SIGTERM)
    assert life.wait(1) == 75
    assert "stopping at once" in (tmp_path / "out.txt").read_text()
    assert_as_if_nothing_had_happened(zygote, short[0], tmp_path, Watch(tmp_path))


def test_a_step_that_hangs_is_given_up(zygote: Zygote, short: list[Job], tmp_path: Path) -> None:
    life = hanging(zygote, short[0], tmp_path, grace=1)
    assert life.wait(0.5) is None
    assert life.wait(2) == 75
    assert_as_if_nothing_had_happened(zygote, short[0], tmp_path, Watch(tmp_path))


def test_stacks_on_request(zygote: Zygote, long: list[Job], tmp_path: Path) -> None:
    life = zygote.start(long[0].start(tmp_path))
    until(holds(tmp_path / "out.txt", "step  5/60"), life)
    life.kill(signal.SIGUSR1)
    log = tmp_path / "run" / "log.txt"
    until(lambda: log.read_text().count("(most recent call first)") >= 2, life)
    assert life.wait(60) == 0
    stacks = log.read_text()
    assert "in _watch" in stacks
    assert "zo_ds/trainer/train.py" in stacks
    assert_as_if_nothing_had_happened(zygote, long[0], tmp_path, Watch(tmp_path))


def test_a_run_outlives_the_shell_that_started_it(short: list[Job], tmp_path: Path) -> None:
    """As with nohup, after logging out."""
    command = (
        f"nohup {jobs.BIN / 'zo_ds'} train {short[0].recipe} output.run_dir=run training.steps=200 >out.txt 2>&1 & "
    )
    wait = "until [ -f run/metrics.jsonl ]; do sleep 0.1; done; echo $!"
    shell = subprocess.run(
        ["bash", "-c", command + wait], cwd=tmp_path, env=jobs.environment(OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    pid = int(shell.stdout)
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "run" / "result.json").exists(), (tmp_path / "out.txt").read_text()[-300:]
