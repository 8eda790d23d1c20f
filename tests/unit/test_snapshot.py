"""A snapshot is whole or does not count, and no bit of it is believed unchecked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from zo_ds.errors import CorruptRunError
from zo_ds.files import remove_folder
from zo_ds.journal import snapshot
from zo_ds.journal.history import History, read_journal, segment_name
from zo_ds.journal.journal import Journal
from zo_ds.journal.records import Header, StepRecord, terms_of
from zo_ds.journal.recovery import Start, choose_start, drop_later
from zo_ds.journal.snapshot import (
    SnapshotInfo,
    committed,
    files_of,
    folder_of,
    purge,
    quarantine,
    read_info,
    verify,
    write_snapshot,
)
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.update import Update
from zo_ds.stores import shards
from zo_ds.stores.shards import Place, places, read_checked, write_weights
from zo_ds.tensor_files import folder_files

pytestmark = pytest.mark.usefixtures("one_thread")

INFO = SnapshotInfo("00ff", 30, 0x0123456789ABCDEF, 3, 2**32 - 1)
TENSORS: list[tuple[str, Tensor]] = [
    ("w", torch.arange(30, dtype=torch.float32).view(5, 6) / 7),
    ("größe", torch.arange(9).bfloat16()),
    ("scalar", torch.tensor(1.5, dtype=torch.float16)),
    ("empty", torch.empty(0, 3)),
    ("ids", torch.arange(4)),
    ("mask", torch.tensor([True, False, True])),
]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync is good for is seen in test_faults."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    monkeypatch.setattr(snapshot, "BLOCK", 64)


def extras(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1}\n')
    (folder / "tokenizer.json").write_bytes(bytes(range(150)))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def flip(path: Path, at: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def same(found: dict[str, Tensor], wanted: Sequence[tuple[str, Tensor]]) -> bool:
    return found.keys() == dict(wanted).keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in wanted
    )


# --- Weights ---


@pytest.mark.parametrize(("limit", "files"), [(2**30, 1), (100, 4), (1, 6)])
@pytest.mark.parametrize("block", [1, 64, 200, 2**20])
def test_weights_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, files: int, block: int
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    monkeypatch.setattr(shards, "BLOCK", block)
    written = write_weights(tmp_path, TENSORS)
    parts = sorted(tmp_path.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for part in parts:
        tensors = load_file(part)
        assert not tensors.keys() & found.keys()
        found.update(tensors)
    assert same(found, TENSORS)
    assert same(dict(folder_files(tmp_path).tensors()), TENSORS)
    for part in parts:
        with safe_open(part, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert {f.name: f.size for f in written} == {name: (tmp_path / name).stat().st_size for name in names(tmp_path)}
    for one in written:
        if one.name.endswith(".safetensors"):
            raw = (tmp_path / one.name).read_bytes()
            blocks = [hashlib.sha256(raw[at : at + block]).hexdigest() for at in range(0, len(raw), block)]
            assert list(one.blocks) == blocks
    single = len(parts) == 1
    assert single == (limit == 2**30)
    assert [p.name for p in parts] == (
        ["model.safetensors"]
        if single
        else [f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors" for n in range(len(parts))]
    )
    if not single:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in TENSORS)
        assert {name: load_file(tmp_path / part)[name].dtype for name, part in index["weight_map"].items()} == {
            name: t.dtype for name, t in TENSORS
        }


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = [("t", whole.t()), ("column", whole[:, 1]), ("p", torch.nn.Parameter(whole))]
    write_weights(tmp_path, tensors)
    assert same(load_file(tmp_path / "model.safetensors"), [(name, t.detach()) for name, t in tensors])


def test_told_when_the_tensors_may_change(tmp_path: Path) -> None:
    tensors = [(name, t.clone()) for name, t in TENSORS]

    def scribble() -> None:
        for _, t in tensors:
            t.zero_()

    write_weights(tmp_path, tensors, on_read=scribble)
    assert same(dict(folder_files(tmp_path).tensors()), TENSORS)


@pytest.mark.parametrize("limit", [2**30, 100])
def test_places_and_checked_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    monkeypatch.setattr(shards, "BLOCK", 64)
    files = {f.name: f for f in write_weights(tmp_path, TENSORS)}
    found = places(tmp_path, files)
    assert found.keys() == dict(TENSORS).keys()
    for name, tensor in TENSORS:
        place = found[name]
        if not tensor.numel():
            assert place.count == 0
            continue
        raw = read_checked(tmp_path, files[place.file], place.start, place.count)
        assert raw == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    place: Place = found["w"]
    for block in range(files[place.file].size // 64 + 1):
        flip(tmp_path / place.file, min(block * 64 + 9, files[place.file].size - 1), 3)
        touched = place.start // 64 <= block <= (place.start + place.count - 1) // 64
        with pytest.raises(CorruptRunError, match="not as it was written") if touched else nullcontext():
            read_checked(tmp_path, files[place.file], place.start, place.count)
        flip(tmp_path / place.file, min(block * 64 + 9, files[place.file].size - 1), 3)
    os.truncate(tmp_path / place.file, place.start + 8)
    with pytest.raises(CorruptRunError, match="not as it was written"):
        read_checked(tmp_path, files[place.file], place.start, place.count)


def test_a_damaged_header_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    (one,) = write_weights(tmp_path, TENSORS)
    for at in (0, 7, 8, 40, 150):
        flip(tmp_path / one.name, at, 1)
        with pytest.raises(CorruptRunError, match="not as it was written"):
            places(tmp_path, {one.name: one})
        flip(tmp_path / one.name, at, 1)
    assert places(tmp_path, {one.name: one}).keys() == dict(TENSORS).keys()


def test_checked_read_of_one_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 64)
    (one,) = write_weights(tmp_path, TENSORS)
    raw = (tmp_path / one.name).read_bytes()
    for start in range(0, one.size - 4, 4):
        assert read_checked(tmp_path, one, start, 4) == raw[start : start + 4]


# --- Snapshots ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("with_extras", [False, True])
def test_round_trip(tmp_path: Path, with_extras: bool) -> None:
    parent = tmp_path / "deep" / "snapshots"
    folder = write_snapshot(parent, INFO, TENSORS, extras=extras if with_extras else None)
    assert folder == folder_of(parent, 30) == parent / "step-00000030"
    assert names(parent) == ["step-00000030"]
    files = ["COMMIT", *["config.json"] * with_extras, "manifest.json", "model.safetensors"]
    assert names(folder) == [*files, *["tokenizer.json"] * with_extras]
    assert verify(folder) == read_info(folder) == INFO
    assert {f.name for f in files_of(folder)} == set(names(folder)) - {"COMMIT", "manifest.json"}
    assert committed(parent) == [folder]
    assert same(dict(folder_files(folder).tensors()), TENSORS)
    manifest = (folder / "manifest.json").read_bytes()
    assert (folder / "COMMIT").read_text().strip() == hashlib.sha256(manifest).hexdigest()
    tree = json.loads(manifest)
    assert (tree["format"], tree["snapshot_version"], tree["block_bytes"]) == ("zo_ds snapshot", 1, 64)
    assert (tree["state_hash"], tree["journal"]) == ("0123456789abcdef", {"segment": 3, "chain": 2**32 - 1})


@pytest.mark.usefixtures("small_blocks")
def test_written_again(tmp_path: Path) -> None:
    write_snapshot(tmp_path, INFO, TENSORS)
    other = [("w", torch.zeros(3))]
    folder = write_snapshot(tmp_path, INFO, other)
    assert verify(folder) == INFO
    assert same(dict(folder_files(folder).tensors()), other)
    assert committed(tmp_path) == [folder]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_snapshot(tmp_path / "s", INFO, TENSORS)
    assert caught.value.errno == 28
    assert names(tmp_path / "s") == []


def test_failing_extras_leave_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        extras(folder)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_snapshot(tmp_path, INFO, TENSORS, extras=fail)
    assert names(tmp_path) == []


@pytest.fixture
def whole(tmp_path: Path, small_blocks: None) -> Path:
    """A snapshot small enough to break in every place."""
    tensors = [("w", torch.arange(12, dtype=torch.float32)), ("b", torch.arange(5).bfloat16())]
    return write_snapshot(tmp_path / "snapshots", INFO, tensors, extras=extras)


def test_every_flipped_bit_is_found(whole: Path) -> None:
    outcomes: Counter[str] = Counter()
    total = 0
    for path in sorted(whole.iterdir()):
        raw = path.read_bytes()
        total += 8 * len(raw)
        with path.open("r+b", buffering=0) as handle:
            for at, byte in enumerate(raw):
                for bit in range(8):
                    os.pwrite(handle.fileno(), bytes([byte ^ 1 << bit]), at)
                    try:
                        verify(whole)
                        outcomes[path.name] += 1
                    except CorruptRunError:
                        outcomes["found"] += 1
                os.pwrite(handle.fileno(), bytes([byte]), at)
    # All that may be let pass is the line feed of COMMIT turned into another blank.
    assert outcomes.pop("COMMIT", 0) <= 1
    assert outcomes.keys() == {"found"}
    assert outcomes["found"] >= total - 1
    assert verify(whole) == INFO


NAMES = ("COMMIT", "config.json", "manifest.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_is_found(whole: Path, name: str) -> None:
    (whole / name).unlink()
    with pytest.raises(CorruptRunError, match="a snapshot is damaged"):
        verify(whole)
    assert committed(whole.parent) == ([] if name == "COMMIT" else [whole])


@pytest.mark.parametrize("name", NAMES)
def test_file_of_another_length_is_found(whole: Path, name: str) -> None:
    raw = (whole / name).read_bytes()
    end = len(raw.rstrip()) if name == "COMMIT" else len(raw)
    for changed in (*(raw[:length] for length in range(0, end)), raw + b"\0", b"\0" + raw, raw + raw):
        (whole / name).write_bytes(changed)
        with pytest.raises(CorruptRunError, match="a snapshot is damaged") as caught:
            verify(whole)
        assert str(whole) in caught.value.where


@pytest.mark.parametrize("name", NAMES)
def test_file_in_place_of_another_is_found(whole: Path, name: str) -> None:
    raw = (whole / name).read_bytes()
    for other in NAMES:
        if other != name:
            (whole / name).write_bytes((whole / other).read_bytes())
            with pytest.raises(CorruptRunError, match="a snapshot is damaged"):
                verify(whole)
    (whole / name).write_bytes(raw)
    (whole / name).rename(whole / "aside")
    (whole / name).mkdir()
    with pytest.raises(CorruptRunError, match="a snapshot is damaged"):
        verify(whole)


def test_file_of_another_snapshot_is_found(whole: Path) -> None:
    tensors = [("w", torch.ones(12)), ("b", torch.arange(5).bfloat16())]
    other = write_snapshot(whole.parent, replace(INFO, step=31), tensors, extras=extras)
    for name in ("COMMIT", "manifest.json", "model.safetensors"):
        raw = (whole / name).read_bytes()
        (whole / name).write_bytes((other / name).read_bytes())
        with pytest.raises(CorruptRunError, match="a snapshot is damaged"):
            verify(whole)
        (whole / name).write_bytes(raw)
    assert verify(whole) == INFO


def test_swapped_blocks_are_found(whole: Path) -> None:
    path = whole / "tokenizer.json"
    raw = path.read_bytes()
    path.write_bytes(raw[64:128] + raw[:64] + raw[128:])
    with pytest.raises(CorruptRunError, match="block 0 of 3"):
        verify(whole)


def recommit(folder: Path, **changes: object) -> None:
    tree = json.loads((folder / "manifest.json").read_text()) | changes
    raw = json.dumps(tree).encode()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "COMMIT").write_text(hashlib.sha256(raw).hexdigest())


def test_other_version_is_named(whole: Path) -> None:
    recommit(whole, snapshot_version=2)
    for read in (verify, read_info, files_of):
        with pytest.raises(CorruptRunError, match="snapshot_version is 2, this zo_ds reads 1"):
            read(whole)
    recommit(whole, snapshot_version=1, format="other")
    with pytest.raises(CorruptRunError, match="a snapshot is damaged"):
        read_info(whole)


def test_other_blocks_are_understood_or_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BLOCK", 128)
    with suppress(CorruptRunError):
        assert verify(whole) == INFO


def test_verifying_waits_for_no_disk(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    assert verify(whole) == INFO


def test_unfinished_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorruptRunError, match="not finished: No such file"):
        read_info(tmp_path / "step-00000001")


# --- Keeping ---


def snapshots(parent: Path, *steps: int, run_id: str = "00ff") -> list[Path]:
    tensors = [("w", torch.arange(4.0))]
    return [write_snapshot(parent, SnapshotInfo(run_id, step, 1, 0, 0), tensors) for step in steps]


def test_committed_newest_first(tmp_path: Path) -> None:
    folders = snapshots(tmp_path, 2, 100, 30)
    (folders[2] / "COMMIT").unlink()
    (tmp_path / "step-x").mkdir()
    quarantine(snapshots(tmp_path, 7)[0])
    assert committed(tmp_path) == [folders[1], folders[0]]
    assert committed(tmp_path / "none") == []


def test_quarantine_keeps_the_files(tmp_path: Path) -> None:
    (folder,) = snapshots(tmp_path, 2)
    aside = quarantine(folder)
    assert names(tmp_path) == [aside.name]
    assert aside.name.startswith("step-00000002.")
    assert aside.suffix == ".damaged"
    assert verify(aside).step == 2


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_purge(tmp_path: Path, keep: int, left: list[int]) -> None:
    snapshots(tmp_path, 10, 20, 30, 40)
    (unfinished,) = snapshots(tmp_path, 50)
    (unfinished / "COMMIT").unlink()
    temporary = tmp_path / ".step-00000060.tmp"
    temporary.mkdir()
    (temporary / "half").write_text("x")
    aside = quarantine(snapshots(tmp_path, 5)[0])
    assert list(purge(tmp_path, keep)) == []
    assert names(tmp_path) == sorted([aside.name, *(folder_of(tmp_path, step).name for step in left)])
    assert [verify(folder).step for folder in committed(tmp_path)] == left[::-1]


def test_purge_tells_what_it_could_not_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = snapshots(tmp_path, 10, 20, 30)

    def refuse(folder: Path) -> None:
        if folder == folders[0]:
            raise OSError(5, "Input/output error")
        remove_folder(folder)

    monkeypatch.setattr(snapshot, "remove_folder", refuse)
    assert list(purge(tmp_path, 1)) == [f"{folders[0]}: Input/output error"]
    assert committed(tmp_path) == [folders[2]]
    assert folders[0].is_dir()
    assert not folders[1].exists()


# --- Where to begin ---

HEADER = Header(
    run_id="00ff",
    run_seed=1,
    noise=NoiseStructure.DENSE,
    estimator="fzoo",
    num_directions=1,
    coefficient_cap=1.0,
    base_sha256="ab" * 32,
    parameters=(ParamInfo("w", (4,), torch.float32),),
    zo_ds="0",
)


def make_run(folder: Path, coefficient: float = 0.5) -> Path:
    """Segments 0-9, 10-19, 20-29, 30-34 and a snapshot at each beginning."""
    journal = Journal.create(folder / "journal", HEADER)
    for step in range(35):
        if step and step % 10 == 0:
            journal.rotate()
            info = SnapshotInfo(HEADER.run_id, step, 1, *journal.position)
            write_snapshot(folder / "snapshots", info, [("w", torch.arange(4.0))])
        journal.append(StepRecord(Update(step, terms_of(step, [coefficient], 1)), None, 1.0, 1.0))
    journal.close()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def history(run: Path) -> History:
    return read_journal(run / "journal")


def start(run: Path, last: int | None = None, move: bool = True) -> tuple[Start, list[str]]:
    told: list[str] = []
    return choose_start(history(run), run / "snapshots", told.append, last, move), told


def at(run: Path, step: int, end: int = 35) -> Start:
    return Start(step, folder_of(run / "snapshots", step) if step else None, end)


def spoil(run: Path, step: int, name: str = "model.safetensors") -> None:
    flip(folder_of(run / "snapshots", step) / name, 20, 1)


def cut(run: Path, segment: int, records: int) -> None:
    """Remove records from the end of a segment."""
    path = run / "journal" / segment_name(segment)
    os.truncate(path, path.stat().st_size - 48 * records)


def test_newest_is_chosen(run: Path) -> None:
    assert start(run) == (at(run, 30), [])


@pytest.mark.parametrize(("last", "step"), [(34, 30), (30, 30), (29, 20), (9, 0), (0, 0)])
def test_not_behind_the_last_step_asked_for(run: Path, last: int, step: int) -> None:
    assert start(run, last) == (at(run, step), [])


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "COMMIT"])
def test_damaged_ones_are_moved_aside(run: Path, name: str) -> None:
    spoil(run, 30, name)
    found, told = start(run)
    assert found == at(run, 20)
    assert len(told) == 1
    assert "step-00000030" in told[0]
    assert [f.name for f in committed(run / "snapshots")] == ["step-00000020", "step-00000010"]
    assert len(list((run / "snapshots").glob("step-00000030.*.damaged"))) == 1
    assert start(run) == (at(run, 20), [])


def test_damaged_ones_stay_for_who_only_looks(run: Path) -> None:
    spoil(run, 30)
    spoil(run, 20, "manifest.json")
    before = names(run / "snapshots")
    found, told = start(run, move=False)
    assert found == at(run, 10)
    assert len(told) == 2
    assert names(run / "snapshots") == before


def test_base_if_all_are_damaged(run: Path) -> None:
    for step in (10, 20, 30):
        spoil(run, step)
    found, told = start(run)
    assert found == at(run, 0)
    assert len(told) == 3
    assert committed(run / "snapshots") == []
    assert start(run) == (at(run, 0), [])


def test_base_without_snapshots(run: Path) -> None:
    remove_folder(run / "snapshots")
    assert start(run) == (at(run, 0), [])


def test_snapshot_behind_the_end_is_not_chosen(run: Path) -> None:
    (run / "journal" / segment_name(3)).unlink()
    cut(run, 2, 4)
    assert start(run) == (at(run, 20, 26), [])
    told: list[str] = []
    drop_later(run / "snapshots", 26, told.append)
    assert len(told) == 1
    assert [read_info(f).step for f in committed(run / "snapshots")] == [20, 10]
    drop_later(run / "snapshots", 26, told.append)
    assert len(told) == 1


def test_snapshot_right_at_the_end(run: Path) -> None:
    (run / "journal" / segment_name(3)).unlink()
    assert start(run) == (at(run, 30, 30), [])


def test_snapshots_of_another_run_are_ignored(run: Path) -> None:
    snapshots(run / "snapshots", 34, run_id="beef")
    assert start(run) == (at(run, 30), [])
    assert len(committed(run / "snapshots")) == 4


@pytest.mark.parametrize("how", ["cut", "gone", "header"])
def test_damaged_segment_before_a_good_snapshot(run: Path, how: str) -> None:
    path = run / "journal" / segment_name(2)
    if how == "cut":
        cut(run, 2, 1)
    elif how == "gone":
        path.unlink()
    else:
        flip(path, 30, 0)
    assert not history(run).whole
    assert start(run) == (at(run, 30), [])
    spoil(run, 30)
    found, told = start(run)
    assert found == at(run, 20, 29 if how == "cut" else 20)
    assert len(told) == 1


def test_furthest_end_wins_over_the_newest_snapshot(run: Path) -> None:
    """The last segment is lost, so the newest snapshot that counts is the one from which most steps follow."""
    (run / "journal" / segment_name(3)).unlink()
    cut(run, 2, 9)
    assert start(run) == (at(run, 20, 21), [])


def test_nothing_leads_anywhere(run: Path) -> None:
    (run / "journal" / segment_name(0)).unlink()
    for step in (10, 20, 30):
        spoil(run, step)
    with pytest.raises(CorruptRunError, match="the journal cannot be read at step 0"):
        start(run)


def test_lost_beginning_is_no_loss_with_a_snapshot(run: Path) -> None:
    (run / "journal" / segment_name(0)).unlink()
    assert start(run) == (at(run, 30), [])
    assert start(run, last=12) == (at(run, 10), [])


def test_snapshot_of_other_steps_is_not_chosen(run: Path) -> None:
    """The same run, but its steps were taken again, differently, after a snapshot was made."""
    other = make_run(run / "other", coefficient=0.25)
    for number in (0, 1, 2, 3):
        os.replace(other / "journal" / segment_name(number), run / "journal" / segment_name(number))
    found, told = start(run)
    assert found == at(run, 0)
    assert len(told) == 3
