"""Whatever call of the disk fails, and whenever the process or the power ends: what was said to be safe is safe."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from tests.unit.faultyfs import CALLS, Fault, FaultyFS
from zo_ds.errors import DataError, MachineError
from zo_ds.files import sync, write_all, write_atomically, write_folder_atomically
from zo_ds.journal import snapshot
from zo_ds.journal.history import read_journal, segment_name
from zo_ds.journal.journal import Journal
from zo_ds.journal.records import Header, StepRecord, terms_of
from zo_ds.journal.snapshot import SnapshotInfo, committed, purge, verify, write_snapshot
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.update import Update
from zo_ds.stores import shards

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib holds functions of os where no test can reach them"),
]

ERRORS = [fault for fault in Fault if not fault.ends_it]
ENDS = [fault for fault in Fault if fault.ends_it]
POWER = [Fault.POWER_BEFORE, Fault.POWER_AFTER]
REMOVALS = ("unlink", "rmdir")
BUT_CLOSE = tuple(name for name in CALLS if name != "close")
Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the directory that is watched; inside it fsync is modelled."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: thousands of directories are made."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def each(
    tmp_path: Path, fault: Fault, prepare: Callable[[Path], object], only: tuple[str, ...] = CALLS
) -> Iterator[FaultyFS]:
    """A disk for every call that the fault can strike, and one that it does not reach."""
    for at in itertools.count(1):
        root = tmp_path / f"{fault.name}-{at}"
        root.mkdir()
        prepare(root)
        disk = FaultyFS(root, fault, at, only)
        yield disk
        if disk.hit is None:
            assert at > 1
            return
        shutil.rmtree(root)


def insisted(disk: FaultyFS, action: Callable[[], Result], kind: type[Exception] = OSError) -> Result:
    """Do it, and if the disk refuses, mend the disk and do it again."""
    try:
        return action()
    except kind:
        assert disk.hit is not None
        disk.mend()
        return action()


def afterwards(disk: FaultyFS) -> Iterator[str]:
    """What the directory may look like in the end, one after the other."""
    if disk.fault not in (Fault.POWER_BEFORE, Fault.POWER_AFTER):
        yield "as it is"
    if disk.fault in (Fault.CRASH_BEFORE, Fault.CRASH_AFTER):
        return
    disk.cut_power()
    yield "what was durable"
    for seed in range(3):
        disk.cut_power(random.Random(seed))
        yield f"a random part, {seed}"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- The disk itself ---


def test_what_was_not_synced_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"old")
    disk = FaultyFS(root)
    with disk.watching():
        for name, durable in (("both", True), ("name", False)):
            handle = os.open(root / name, os.O_WRONLY | os.O_CREAT)
            os.pwrite(handle, b"first", 0)
            if durable:
                os.fsync(handle)
            os.pwrite(handle, b"later", 3)
            os.close(handle)
        sync(root)
        (root / "folder").mkdir()
        os.replace(root / "old", root / "new")
        (root / "both").unlink()
    assert names(root) == ["folder", "name", "new"]
    assert disk.calls.count("pwrite") == 4
    disk.cut_power()
    assert tree(root) == {"both": b"first", "name": b"", "old": b"old"}
    assert names(root) == ["both", "name", "old"]


def test_a_failed_fsync_loses_what_is_not_written_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"....")
    disk = FaultyFS(root, Fault.EIO, 1, ("fsync",))
    with disk.watching():
        handle = os.open(root / "file", os.O_WRONLY)
        os.pwrite(handle, b"ab", 0)
        with pytest.raises(OSError, match="injected"):
            os.fsync(handle)
        os.pwrite(handle, b"b", 1)
        os.fsync(handle)
        os.close(handle)
    assert tree(root) == {"file": b"ab.."}
    disk.cut_power()
    assert tree(root) == {"file": b".b.."}


def test_nothing_happens_after_a_crash(tmp_path: Path) -> None:
    for fault, wanted in ((Fault.CRASH_BEFORE, []), (Fault.CRASH_AFTER, ["a"])):
        root = tmp_path / fault.name
        root.mkdir()
        disk = FaultyFS(root, fault, 1)
        with disk.watching():
            try:
                (root / "a").mkdir()
            finally:
                (root / "b").mkdir()
        assert (disk.crashed, disk.hit) == (True, "mkdir")
        assert names(root) == wanted


def test_short_writes_and_errors(tmp_path: Path) -> None:
    wanted = {Fault.SHORT: [5, 10], Fault.EIO: [errno.EIO, 10], Fault.ENOSPC: [errno.ENOSPC, 10]}
    wanted |= {Fault.FULL: [5, errno.ENOSPC], Fault.DEAD: [errno.EIO, errno.EIO], Fault.EINTR: [errno.EINTR, 10]}
    for fault in ERRORS:
        disk = FaultyFS(tmp_path, fault, 1, ("pwrite",))
        with disk.watching():
            handle = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
            found = []
            for _ in range(2):
                try:
                    found.append(os.pwrite(handle, bytes(10), 0))
                except OSError as error:
                    found.append(error.errno or 0)
            disk.mend()
            assert os.pwrite(handle, bytes(10), 0) == 10
            os.close(handle)
        assert found == wanted[fault]


# --- Files ---


def old_file(root: Path) -> None:
    (root / "file").write_bytes(b"old")


@pytest.mark.parametrize("fault", ERRORS)
def test_file_that_cannot_be_written(tmp_path: Path, fault: Fault) -> None:
    for disk in each(tmp_path, fault, old_file):
        path = disk.root / "file"
        with disk.watching():
            try:
                write_atomically(path, b"new content")
            except OSError:
                assert disk.hit is not None
                assert path.read_bytes() in (b"old", b"new content")
                assert names(disk.root) == ["file"] or fault is Fault.DEAD or disk.hit in REMOVALS
                disk.mend()
                write_atomically(path, b"new content")
        for _ in afterwards(disk):
            assert tree(disk.root) == {"file": b"new content"}


@pytest.mark.parametrize("fault", ENDS)
def test_file_when_all_ends(tmp_path: Path, fault: Fault) -> None:
    for disk in each(tmp_path, fault, old_file):
        returned = False
        with disk.watching():
            write_atomically(disk.root / "file", b"new content")
            returned = True
        for _ in afterwards(disk):
            found = (disk.root / "file").read_bytes()
            assert found == b"new content" or (not returned and found == b"old")


def old_folder(root: Path) -> None:
    (root / "model").mkdir()
    (root / "model" / "kept").write_bytes(b"old")


OLD = {"kept": b"old"}
FLAT = {"a": b"new a", "b": b"new b"}
NESTED = {"a": b"new a", "deep/er/b": b"new b"}


def fill(content: dict[str, bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            try:
                write_all(handle, data, 0)
            finally:
                os.close(handle)

    return write


@pytest.mark.parametrize("fault", ERRORS)
def test_folder_that_cannot_be_written(tmp_path: Path, fault: Fault) -> None:
    for disk in each(tmp_path, fault, old_folder):
        path = disk.root / "model"
        with disk.watching():
            try:
                write_folder_atomically(path, fill(NESTED))
            except OSError:
                assert disk.hit is not None
                kept = path if path.exists() else disk.root / ".model.old"
                assert tree(kept) in (OLD, NESTED)
                assert kept == path or fault is Fault.DEAD
                assert names(disk.root) == ["model"] or fault is Fault.DEAD or disk.hit in REMOVALS
                disk.mend()
                write_folder_atomically(path, fill(NESTED))
        assert tree(path) == NESTED
        if disk.hit not in REMOVALS:
            assert names(disk.root) == ["model"]
        disk.mend()
        write_folder_atomically(path, fill(FLAT))
        assert tree(disk.root) == {f"model/{name}": data for name, data in FLAT.items()}


def ended_folder(tmp_path: Path, fault: Fault, content: dict[str, bytes]) -> None:
    for disk in each(tmp_path, fault, old_folder):
        path = disk.root / "model"
        returned = False
        with disk.watching():
            write_folder_atomically(path, fill(content))
            returned = True
        for _ in afterwards(disk):
            found = tree(path if path.exists() else disk.root / ".model.old")
            assert found == content or (not returned and found == OLD)
            write_folder_atomically(path, fill({"next": b"c"}))
            assert tree(disk.root) == {"model/next": b"c"}


@pytest.mark.parametrize("fault", ENDS)
def test_folder_when_all_ends(tmp_path: Path, fault: Fault) -> None:
    ended_folder(tmp_path, fault, FLAT)


@pytest.mark.parametrize("fault", POWER)
def test_deep_folder_when_the_power_fails(tmp_path: Path, fault: Fault) -> None:
    ended_folder(tmp_path, fault, NESTED)


# --- Journal ---

HEADER = Header(
    run_id="00ff",
    run_seed=1,
    noise=NoiseStructure.FACTORED,
    estimator="fzoo",
    num_directions=2,
    coefficient_cap=1.0,
    base_sha256="ab" * 32,
    parameters=(ParamInfo("w", (4,), torch.float32),),
    zo_ds="0",
)
STEPS = 15


def record_of(step: int) -> StepRecord:
    if step % 6 == 5:
        return StepRecord(Update(step, ()), SkipReason.ZERO_SPREAD, 1.0, 0.0)
    return StepRecord(Update(step, terms_of(step, [step / 64, -0.5], 2), 0.25), None, 2.0, 1 / 3, step)


TRUTH = [record_of(step) for step in range(STEPS)]


@dataclass
class Progress:
    """What the run was told: its journal is there, so many steps are safe, so many were tried."""

    begun: bool = False
    safe: int = 0
    tried: int = 0


class NeverError(Exception):
    pass


def with_folder(root: Path) -> None:
    (root / "journal").mkdir()


def live(disk: FaultyFS, told: Progress, sync_every: int = 1, patient: bool = False) -> None:
    """Fifteen steps in two segments; the patient do not try again to begin the second before two steps have passed."""
    folder = disk.root / "journal"
    try:
        journal = Journal.create(folder, HEADER, STEPS, sync_every)
    except MachineError:
        disk.mend()
        made = any(folder.glob("*.zoj"))
        assert not made or disk.fault is Fault.DEAD or disk.hit in REMOVALS
        journal = opened(folder, sync_every)
    told.begun = True
    due = 10
    for record in TRUTH:
        if record.step == due:
            try:
                insisted(disk, journal.rotate, NeverError if patient else MachineError)
                told.safe = record.step
            except MachineError:
                disk.mend()
                due += 2
        told.tried = record.step + 1
        insisted(disk, lambda record=record: attempt(disk, journal, told, record), MachineError)
        told.safe = journal.durable_steps
    try:
        journal.close()
    except MachineError:
        assert disk.hit is not None
        disk.mend()
    else:
        told.safe = STEPS


def opened(folder: Path, sync_every: int = 1) -> Journal:
    if any(folder.glob("*.zoj")):
        return Journal.reopen(folder, read_journal(folder), 0, STEPS, sync_every)
    return Journal.create(folder, HEADER, STEPS, sync_every)


def attempt(disk: FaultyFS, journal: Journal, told: Progress, record: StepRecord) -> None:
    try:
        journal.append(record)
    except MachineError:
        assert journal.durable_steps == told.safe
        # Where the disk allows it, nobody finds a step that nobody applied.
        blank = disk.fault in (Fault.EIO, Fault.ENOSPC, Fault.EINTR)
        read_back(disk.root / "journal", record.step, record.step + (not blank))
        raise


def read_back(folder: Path, least: int, most: int) -> int:
    history = read_journal(folder)
    records = history.records()
    assert records == TRUTH[: len(records)]
    assert least <= len(records) <= most
    return len(records)


def goes_on(folder: Path, tidy: bool = True) -> None:
    """The next process finishes the run."""
    journal = opened(folder)
    for record in TRUTH[journal.next_step :]:
        journal.append(record)
    journal.close()
    assert read_back(folder, STEPS, STEPS) == STEPS
    assert read_journal(folder).whole or not tidy


def ended_journal(
    tmp_path: Path,
    fault: Fault,
    prepare: Callable[[Path], object],
    sync_every: int = 1,
    only: tuple[str, ...] = CALLS,
    patient: bool = False,
) -> None:
    for disk in each(tmp_path, fault, prepare, only):
        told = Progress()
        folder = disk.root / "journal"
        with disk.watching():
            live(disk, told, sync_every, patient)
        assert disk.crashed == (fault.ends_it and disk.hit is not None)
        for state in afterwards(disk):
            least = told.safe if disk.crashed or state != "as it is" else STEPS
            if fault in (Fault.CRASH_BEFORE, Fault.CRASH_AFTER):
                least = max(0, told.tried - 1)  # the kernel has what was written
            if least or told.begun or any(folder.glob("*.zoj")):
                read_back(folder, least, told.tried)
            else:
                with pytest.raises(DataError):
                    read_journal(folder)
            goes_on(folder, tidy=fault is not Fault.DEAD)  # it may have had to leave half a segment


OFTEN = [fault for fault in Fault if fault is not Fault.DEAD]


@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("fault", [*OFTEN, Fault.DEAD])
def test_journal(tmp_path: Path, fault: Fault, sync_every: int) -> None:
    ended_journal(tmp_path, fault, with_folder, sync_every, CALLS if fault.ends_it else BUT_CLOSE)


@pytest.mark.parametrize("fault", [*ERRORS[:-1], Fault.DEAD])
def test_journal_whose_next_segment_has_to_wait(tmp_path: Path, fault: Fault) -> None:
    ended_journal(tmp_path, fault, with_folder, only=BUT_CLOSE, patient=True)


@pytest.mark.parametrize("sync_every", [1, 3])
def test_journal_that_cannot_be_closed(tmp_path: Path, sync_every: int) -> None:
    ended_journal(tmp_path, Fault.EIO, with_folder, sync_every, ("close",))


def test_journal_in_a_new_folder(tmp_path: Path) -> None:
    ended_journal(tmp_path, Fault.POWER_AFTER, lambda root: None)


def insisting(action: Callable[[], Result]) -> Result:
    for _ in range(100):
        try:
            return action()
        except MachineError:
            continue
    raise AssertionError("the disk cannot be that bad")


@pytest.mark.parametrize("sync_every", [1, 3])
def test_journal_in_a_storm(tmp_path: Path, sync_every: int) -> None:
    cuts = 0
    for seed in range(150):
        root = tmp_path / f"{seed}"
        root.mkdir()
        with_folder(root)
        disk = FaultyFS(root, only=BUT_CLOSE, storm=random.Random(seed))
        told = Progress()
        folder = root / "journal"
        with disk.watching():
            journal = insisting(lambda: opened(folder, sync_every))  # noqa: B023
            told.begun = True
            for record in TRUTH:
                if record.step in (4, 10):
                    insisting(journal.rotate)
                    told.safe = record.step
                told.tried = record.step + 1
                insisting(lambda record=record: attempt(disk, journal, told, record))  # noqa: B023
                told.safe = journal.durable_steps
            insisting(journal.sync)
            told.safe = STEPS
        cuts += disk.crashed
        disk.cut_power(random.Random(seed))
        if told.begun:
            read_back(folder, told.safe, told.tried)
        goes_on(folder, tidy=False)
        shutil.rmtree(root)
    assert 20 < cuts < 130


def damaged(root: Path, torn: bool = False) -> None:
    """Twelve steps in three segments; the second is damaged at step 6, or the third torn at its last."""
    folder = root / "journal"
    journal = Journal.create(folder, HEADER, 12)
    for record in TRUTH[:12]:
        if record.step in (4, 8):
            journal.rotate()
        journal.append(record)
    journal.close()
    path = folder / segment_name(2 if torn else 1)
    raw = bytearray(path.read_bytes())
    raw[-20 if torn else -100] ^= 4
    path.write_bytes(raw)
    assert read_journal(folder).whole == torn
    assert read_journal(folder).steps == (11 if torn else 6)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("fault", list(Fault))
def test_journal_that_was_damaged(tmp_path: Path, fault: Fault, torn: bool) -> None:
    damaged_journal(tmp_path, fault, torn)


@pytest.mark.parametrize("fault", [f for f in Fault if f not in POWER])
def test_damaged_bytes_are_kept(tmp_path: Path, fault: Fault) -> None:
    damaged_journal(tmp_path, fault, torn=False, keep=True)


@pytest.mark.parametrize("fault", POWER)
def test_damaged_bytes_are_kept_when_the_power_fails(tmp_path: Path, fault: Fault) -> None:
    damaged_journal(tmp_path, fault, torn=False, keep=True)


def damaged_journal(tmp_path: Path, fault: Fault, torn: bool, keep: bool = False) -> None:
    template = tmp_path / "template"
    damaged(template, torn)
    precious = set(tree(template).values())
    sound = 11 if torn else 6
    only = CALLS if fault.ends_it else BUT_CLOSE
    for disk in each(tmp_path, fault, lambda root: shutil.copytree(template, root, dirs_exist_ok=True), only):
        folder = disk.root / "journal"
        told = Progress(True, sound, sound)
        with disk.watching():
            journal = insisted(disk, lambda: Journal.reopen(folder, read_journal(folder), 0, STEPS), MachineError)  # noqa: B023
            if keep:
                journal.close()
            for record in () if keep else TRUTH[sound:13]:
                told.tried = record.step + 1
                insisted(disk, lambda record=record: attempt(disk, journal, told, record), MachineError)  # noqa: B023
                told.safe = record.step + 1
            if not keep:
                journal.close()
        for _ in afterwards(disk):
            read_back(folder, told.safe, told.tried)
            if keep:
                kept = [raw.rstrip(b"\0") for raw in tree(disk.root).values()]
                assert all(raw.rstrip(b"\0") in kept for raw in precious)
            goes_on(folder)


# --- Snapshots ---


@pytest.fixture
def two_snapshots(tmp_path: Path, small_files: None) -> Path:
    for step in (10, 20):
        write_snapshot(tmp_path / "template" / "snapshots", info(step), tensors(step), extras=extras)
    return tmp_path / "template"


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    monkeypatch.setattr(snapshot, "BLOCK", 64)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)


def info(step: int) -> SnapshotInfo:
    return SnapshotInfo("00ff", step, step, 1, 2)


def tensors(step: int) -> list[tuple[str, Any]]:
    return [("a", torch.arange(20.0) + step), ("b", torch.arange(7).bfloat16())]


def extras(folder: Path) -> None:
    (folder / "config.json").write_text("{}\n")


def steps_of(parent: Path) -> list[int]:
    return [verify(folder).step for folder in committed(parent)]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("fault", list(Fault))
def test_snapshot(tmp_path: Path, two_snapshots: Path, fault: Fault) -> None:
    for disk in each(tmp_path, fault, lambda root: shutil.copytree(two_snapshots, root, dirs_exist_ok=True)):
        parent = disk.root / "snapshots"
        returned = False
        with disk.watching():
            try:
                write_snapshot(parent, info(30), tensors(30), extras=extras)
            except OSError:
                assert disk.hit is not None
                disk.mend()
                assert steps_of(parent)[-2:] == [20, 10]
                left = [name for name in names(parent) if name.endswith(".tmp")]
                assert not left or fault is Fault.DEAD or disk.hit in REMOVALS
                write_snapshot(parent, info(30), tensors(30), extras=extras)
            returned = True
            problems = list(purge(parent, 2))
            assert not problems or disk.hit is not None
            disk.mend()
        for state in afterwards(disk):
            found = steps_of(parent)
            assert 20 in found
            assert not returned or 30 in found
            if state == "as it is" and not disk.crashed and disk.hit not in REMOVALS and fault is not Fault.DEAD:
                assert found == [30, 20]
            # The next process makes order.
            assert list(purge(parent, 2)) == []
            assert len(steps_of(parent)) == 2
            assert all(name.startswith("step-") for name in names(parent))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("fault", [Fault.EIO, Fault.ENOSPC, Fault.FULL])
def test_snapshot_that_fails_leaves_nothing(tmp_path: Path, two_snapshots: Path, fault: Fault) -> None:
    for disk in each(tmp_path, fault, lambda root: shutil.copytree(two_snapshots, root, dirs_exist_ok=True)):
        parent = disk.root / "snapshots"
        with disk.watching():
            try:
                write_snapshot(parent, info(30), tensors(30), extras=extras)
            except OSError:
                disk.mend()
                assert names(parent) == ["step-00000010", "step-00000020"] or disk.hit in REMOVALS


@pytest.mark.usefixtures("small_files")
def test_first_snapshot_in_a_new_folder(tmp_path: Path) -> None:
    for disk in each(tmp_path, Fault.POWER_AFTER, lambda root: None):
        returned = False
        with disk.watching():
            write_snapshot(disk.root / "snapshots", info(30), tensors(30), extras=extras)
            returned = True
        for _ in afterwards(disk):
            assert steps_of(disk.root / "snapshots") in ([[30]] if returned else [[30], []])
