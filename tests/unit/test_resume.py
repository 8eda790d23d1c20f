"""A run that was interrupted, moved or damaged ends with the weights it would have had, or says why it cannot."""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_ds
from tests.conftest import STORES, on_ranks, tiny_model, weights_of, zo_batch
from zo_ds.config.schema import JournalConfig
from zo_ds.engine.durability import Durability
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.resume import Options, Resumed, open_run
from zo_ds.engine.snapshots import SnapshotWriter
from zo_ds.errors import ConfigError, CorruptRunError, MachineError, NonFiniteError, PeerError
from zo_ds.files import write_all
from zo_ds.journal.history import read_journal
from zo_ds.journal.replay import replay_
from zo_ds.journal.snapshot import committed, read_info, verify
from zo_ds.parallel.channel import Channel, SoloChannel
from zo_ds.tensor_files import folder_files

pytestmark = pytest.mark.usefixtures("one_thread")
NEVER = JournalConfig(snapshot_replay_s=1e9)
ALWAYS = JournalConfig(snapshot_replay_s=1e-9, hash_every=1)
LAST = 10


def scaled_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's loss times a factor that comes with the batch: nan makes a step that cannot be taken."""
    inputs = {key: value for key, value in batch.items() if key != "factor"}
    return model(**inputs).loss * batch.get("factor", 1.0)


def open_engine(
    store: str = "resident",
    dtype: torch.dtype = torch.float32,
    channel: Channel | None = None,
    run_dir: Path | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    **options: Any,
) -> ZOEngine:
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": store.partition(":")[2]}}
    maths = {"num_directions": 4, "lr": 5e-3, "run_seed": 3, "weight_decay": 0.3, **options}
    config = {"zero_optimization": nvme if ":" in store else STORES[store], "zeroth_order": maths}
    model = model or tiny_model("llama", seed, dtype)
    return zo_ds.initialize(model, config, loss_fn=scaled_loss, channel=channel or SoloChannel(), run_dir=run_dir)


def units(step: int, channel: Channel | None = None, count: int = 1) -> list[dict[str, Tensor]]:
    """What a rank computes in a step."""
    everything = [zo_batch(examples=2, seed=count * step + unit) for unit in range(count)]
    return everything[channel.rank :: channel.world_size] if channel is not None else everything


def walk(engine: ZOEngine, last: int, count: int = 1) -> str:
    while engine.steps_done < last:
        engine.step(units(engine.steps_done, engine.channel, count))
    return engine.digest()


@cache
def digests(dtype: torch.dtype = torch.float32, noise: str = "dense", count: int = 1) -> list[str]:
    """After each step of a run that nothing happens to."""
    engine = open_engine(dtype=dtype, noise=noise)
    return [walk(engine, last, count) for last in range(15 + 1)]


def durability(engine: ZOEngine) -> Durability:
    assert engine.durability is not None
    return engine.durability


def coefficients(run: Path) -> list[list[float]]:
    return [[term.coefficient for term in record.update.terms] for record in read_journal(run / "journal").records()]


def resume(run: Path, last: int, **options: Any) -> tuple[str, Resumed, list[str]]:
    """Go on with a run to a step; its weights then, how it was opened, what was said."""
    said: list[str] = []
    engine = open_engine(**options)
    resumed = open_run(engine, run, Options(NEVER, warn=said.append))
    digest = walk(engine, last)
    engine.close_journal()
    return digest, resumed, said


def replayed(run: Path, dtype: torch.dtype = torch.float32, steps: int | None = None) -> str:
    """Weights that the journal leads to from the base."""
    return replay_(weights_of(open_engine(dtype=dtype)), read_journal(run / "journal"), steps).weights_sha256


def flip(file: Path, at: int, bit: int = 3) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


def flip_weight(engine: ZOEngine, name: str, element: int, bit: int) -> None:
    (parameter,) = [parameter for parameter, info in engine.store.parameters.items() if info.name == name]
    flat = engine.store.view(parameter).view(-1)
    whole = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int16)
    whole[element] ^= 1 << bit


# Stores and ranks


@pytest.mark.parametrize("noise", ["dense", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_run_goes_from_store_to_store(dtype: torch.dtype, noise: str, tmp_path: Path) -> None:
    wanted = digests(dtype, noise)
    stores = ("resident", "zero3", "zero3-cpu", f"nvme:{tmp_path / 'nvme'}", "resident")
    for number, store in enumerate(stores):
        snapshots = open_engine(store, dtype, noise=noise)
        open_run(snapshots, tmp_path / "snapshots", Options(ALWAYS, total_steps=15))
        for engine in (open_engine(store, dtype, run_dir=tmp_path / "none", noise=noise), snapshots):
            assert (engine.steps_done, engine.digest()) == (3 * number, wanted[3 * number])
            assert walk(engine, 3 * number + 3) == wanted[3 * number + 3]
            engine.close_journal()
    assert coefficients(tmp_path / "none") == coefficients(tmp_path / "snapshots")
    assert not (tmp_path / "none" / "snapshots").exists()
    assert len(committed(tmp_path / "snapshots" / "snapshots")) == 2
    whole = open_engine(dtype=dtype, run_dir=tmp_path / "whole", noise=noise)
    walk(whole, 15)
    assert coefficients(tmp_path / "whole") == coefficients(tmp_path / "none")


@pytest.mark.parametrize("settings", [NEVER, ALWAYS], ids=["base", "snapshot"])
def test_one_run_goes_from_one_rank_to_two_to_four_to_one(settings: JournalConfig, tmp_path: Path) -> None:
    wanted = digests(count=4)
    for last, ranks in ((3, 1), (5, 2), (7, 4), (9, 1)):
        models = [tiny_model("llama") for _ in range(ranks)]

        def work(channel: Channel, models: Any = models, last: int = last) -> tuple[int, str]:
            engine = open_engine(channel=channel, model=models[channel.rank])
            resumed = open_run(engine, tmp_path, Options(settings))
            digest = walk(engine, last, 4)
            engine.close_journal()
            return resumed.step, digest

        before = steps_of(tmp_path)
        assert on_ranks(ranks, work) == [(before, wanted[last])] * ranks
    assert replayed(tmp_path) == wanted[9]


def steps_of(run: Path) -> int:
    return read_journal(run / "journal").steps if (run / "journal").exists() else 0


@pytest.mark.parametrize("settings", [NEVER, ALWAYS], ids=["base", "snapshot"])
def test_a_rank_that_cannot_see_the_run_replays_it_from_the_base(
    settings: JournalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_engine()
    open_run(first, tmp_path / "run", Options(settings))
    walk(first, 5, 2)
    first.close_journal()
    models = [tiny_model("llama") for _ in range(2)]
    here = threading.local()
    sees = zo_ds.engine.resume._usable
    monkeypatch.setattr("zo_ds.engine.resume._usable", lambda folder, step: not here.blind and sees(folder, step))

    def work(channel: Channel) -> tuple[Resumed, str]:
        here.blind = channel.rank == 1
        engine = open_engine(channel=channel, model=models[channel.rank])
        resumed = open_run(engine, tmp_path / ("elsewhere" if here.blind else "run"), Options(settings))
        return resumed, walk(engine, 8, 2)

    (one, digest), (other, same) = on_ranks(2, work)
    assert digest == same == digests(count=2)[8]
    assert (one.step, other.step, other.snapshot, other.replayed) == (5, 5, None, 5)
    assert (one.snapshot is None) == (settings is NEVER)
    assert not (tmp_path / "elsewhere").exists()


def test_ranks_with_other_base_weights_do_not_start(tmp_path: Path) -> None:
    models = [tiny_model("llama", seed) for seed in range(2)]

    def work(channel: Channel) -> None:
        engine = open_engine(channel=channel, model=models[channel.rank])
        open_run(engine, tmp_path)

    for error in on_ranks(2, work):
        assert isinstance(error, PeerError)
        assert "ranks disagree on the base weights" in error.what
    assert not (tmp_path / "journal").exists()


# Snapshots


@pytest.mark.parametrize("forward", ["batched", "sequential"])
@pytest.mark.parametrize("store", ["resident", "zero3", "zero3-cpu", "nvme"])
def test_a_snapshot_is_the_weights_of_its_step_though_training_goes_on(
    store: str, forward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(store if store != "nvme" else f"nvme:{tmp_path / 'nvme'}", forward=forward)
    open_run(engine, tmp_path, Options(NEVER))
    digest = walk(engine, 2)
    ready = hold_the_writer(monkeypatch)
    durability(engine).snapshot()
    later = walk(engine, 3)
    assert ready.is_set()
    durability(engine).wait()
    (folder,) = committed(tmp_path / "snapshots")
    fresh = open_engine(forward=forward)
    fresh.load_weights(dict(folder_files(folder).tensors()))
    assert (fresh.digest(), verify(folder).step) == (digest, 2)
    engine.close_journal()
    again = open_engine(forward=forward)
    resumed = open_run(again, tmp_path)
    assert (resumed.snapshot, resumed.replayed, again.digest()) == (folder, 1, later)


def hold_the_writer(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing of a snapshot is written before an update wants to change the weights; then slowly."""
    ready = threading.Event()
    wait = SnapshotWriter.wait_until_read

    def want(writer: SnapshotWriter) -> None:
        ready.set()
        wait(writer)

    def write_slowly(*given: Any) -> None:
        ready.wait(20)
        time.sleep(0.01)
        write_all(*given)

    monkeypatch.setattr(SnapshotWriter, "wait_until_read", want)
    monkeypatch.setattr("zo_ds.stores.shards.write_all", write_slowly)
    return ready


def test_other_weights_wait_for_a_snapshot_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    open_run(engine, tmp_path, Options(NEVER))
    base = weights_of(engine)
    digest = walk(engine, 2)
    ready = hold_the_writer(monkeypatch)
    durability(engine).snapshot()
    threading.Timer(0.1, ready.set).start()
    engine.load_weights(base)
    engine.close_journal()
    again = open_engine()
    open_run(again, tmp_path)
    assert again.digest() == digest


def test_a_run_of_short_lives_gets_snapshots_too(tmp_path: Path) -> None:
    for last in range(1, 6):
        engine = open_engine()
        open_run(engine, tmp_path, Options(ALWAYS))
        assert walk(engine, last) == digests()[last]
        engine.close_journal()
    assert committed(tmp_path / "snapshots")


@pytest.mark.parametrize("where", ["zo_ds.stores.shards.write_all", "zo_ds.journal.snapshot.sync"])
def test_a_snapshot_that_fails_costs_nothing_but_itself(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = open_engine(), list[str]()
    open_run(engine, tmp_path, Options(NEVER, warn=said.append))
    walk(engine, 2)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(where, refuse)
        durability(engine).snapshot()
        walk(engine, 4)
        durability(engine).wait()
    assert said == ["no snapshot: No space left on device; training goes on, the journal is safe"]
    assert not list((tmp_path / "snapshots").glob("**/*.safetensors"))
    durability(engine).snapshot()
    assert walk(engine, 6) == digests()[6]
    engine.close_journal()
    assert [read_info(folder).step for folder in committed(tmp_path / "snapshots")] == [4]
    assert len(said) == 1
    assert resume(tmp_path, LAST)[0] == digests()[LAST]


# Damaged weights in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("store", ["resident", "zero3-cpu"])
def test_a_flipped_bit_is_put_right_within_a_sweep(
    store: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_ds.engine.audit.BLOCK_ELEMENTS", 200)
    engine, said = open_engine(store, dtype), list[str]()
    often = JournalConfig(snapshot_replay_s=1e9, audit_every=1, hash_every=1)
    open_run(engine, tmp_path, Options(often, warn=said.append))
    walk(engine, 1)
    durability(engine).snapshot()
    durability(engine).wait()
    walk(engine, 2)
    blocks = sum(-(-info.numel // 200) for info in engine.store.parameters.values())
    places = [
        ("model.embed_tokens.weight", 3, 2),
        ("model.layers.1.mlp.up_proj.weight", 383, 5),
        ("model.norm.weight", 15, 15),
    ]
    for place in places:
        flip_weight(engine, *place)
    walk(engine, 2 + blocks)
    assert durability(engine).repaired == len(places)
    assert all(any(f"'{name}', element {at}," in text for text in said) for name, at, _ in places)
    assert engine.digest() == replayed(tmp_path, dtype)
    durability(engine).snapshot()
    walk(engine, 4 + blocks)
    engine.close_journal()
    again, warned = open_engine(dtype=dtype), list[str]()
    open_run(again, tmp_path, Options(often, warn=warned.append))
    assert (again.digest(), warned) == (engine.digest(), [])
    records = read_journal(tmp_path / "journal").records()
    found = replay_(
        weights_of(open_engine(dtype=dtype)), read_journal(tmp_path / "journal"), hash_at=range(len(records))
    )
    wrong = [record.step for record in records if found.hashes[record.step] != record.state_hash]
    assert wrong[0] == 2
    assert wrong[-1] < 2 + blocks


def test_damaged_weights_do_not_survive_a_restart(tmp_path: Path) -> None:
    engine = open_engine()
    open_run(engine, tmp_path, Options(JournalConfig(hash_every=1)))
    walk(engine, 2)
    flip_weight(engine, "model.norm.weight", 0, 10)
    damaged = walk(engine, 4)
    engine.close_journal()
    again, said = open_engine(), list[str]()
    open_run(again, tmp_path, Options(warn=said.append))
    assert again.digest() == replayed(tmp_path) != damaged
    assert len(said) == 1
    assert "weights before step 3 had another state hash" in said[0]


@pytest.mark.parametrize("replay_s", [1e9, 1e-9], ids=["base", "snapshot"])
def test_ranks_notice_damaged_weights_and_the_restart_is_clean(replay_s: float, tmp_path: Path) -> None:
    models = [tiny_model("llama") for _ in range(2)]

    def work(channel: Channel) -> None:
        engine = open_engine(channel=channel, model=models[channel.rank])
        open_run(engine, tmp_path, Options(JournalConfig(hash_every=3, snapshot_replay_s=replay_s)))
        walk(engine, 4, 2)
        if channel.rank == 0:
            flip_weight(engine, "model.norm.weight", 7, 0)
        try:
            walk(engine, 8, 2)
        finally:
            engine.close_journal()

    for error in on_ranks(2, work):
        assert isinstance(error, PeerError)
        assert "ranks disagree on the weights before step 6" in error.what
    engine = open_engine()
    resumed = open_run(engine, tmp_path)
    assert (resumed.step, resumed.replayed) == (6, 6 if replay_s > 1 else 3)
    assert engine.digest() == replayed(tmp_path)


# Damaged files


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, with snapshots after three and six."""
    run = tmp_path_factory.mktemp("recorded")
    engine = open_engine()
    open_run(engine, run, Options(NEVER, total_steps=LAST))
    for last in (3, 6, 8):
        walk(engine, last)
        if last < 8:
            durability(engine).snapshot()
    engine.close_journal()
    return run


Damage = Callable[[Path], None]
NEW, OLD = "snapshots/step-00000006", "snapshots/step-00000003"
NEW_WEIGHTS, OLD_WEIGHTS = f"{NEW}/model.safetensors", f"{OLD}/model.safetensors"
SIZE = 44 + 4 * 4


def flipped(name: str, at: int) -> Damage:
    return lambda run: flip(run / name, at)


def cut(name: str, by: int) -> Damage:
    return lambda run: os.truncate(run / name, (run / name).stat().st_size - by)


def gone(name: str) -> Damage:
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def both(*damages: Damage) -> Damage:
    def do(run: Path) -> None:
        for damage in damages:
            damage(run)

    return do


def segment(number: int) -> str:
    return f"journal/{number:06d}.zoj"


@pytest.mark.parametrize(
    ("damage", "start", "step", "words"),
    [
        pytest.param(both(), 6, 8, None, id="nothing"),
        pytest.param(flipped(NEW_WEIGHTS, -1), 3, 8, "block 0 of 1", id="weights"),
        pytest.param(flipped(NEW_WEIGHTS, 3), 3, 8, "block 0 of 1", id="weights-length"),
        pytest.param(cut(NEW_WEIGHTS, 1), 3, 8, "bytes", id="weights-cut"),
        pytest.param(gone(f"{NEW}/model.safetensors"), 3, 8, "No such file", id="weights-gone"),
        pytest.param(flipped(f"{NEW}/manifest.json", 20), 3, 8, "COMMIT names another manifest", id="manifest"),
        pytest.param(gone(f"{NEW}/manifest.json"), 3, 8, "not finished", id="manifest-gone"),
        pytest.param(flipped(f"{NEW}/COMMIT", 0), 3, 8, "COMMIT names another manifest", id="commit"),
        pytest.param(gone(f"{NEW}/COMMIT"), 3, 8, None, id="commit-gone"),
        pytest.param(gone(NEW), 3, 8, None, id="newest-gone"),
        pytest.param(gone("snapshots"), 0, 8, None, id="all-gone"),
        pytest.param(
            both(flipped(NEW_WEIGHTS, -1), flipped(OLD_WEIGHTS, -1)),
            0, 8, "step-00000003", id="both",
        ),
        pytest.param(flipped(segment(2), -1), 6, 7, None, id="tail"),
        pytest.param(cut(segment(2), 1), 6, 7, None, id="tail-cut"),
        pytest.param(cut(segment(2), 2 * SIZE), 6, 6, None, id="cut-to-the-snapshot"),
        pytest.param(flipped(segment(2), -SIZE - 1), 6, 6, "step 6: its checksum", id="first-of-two"),
        pytest.param(flipped(segment(2), 100), 6, 6, "the header's checksum is wrong", id="header"),
        pytest.param(gone(segment(2)), 6, 6, None, id="segment-gone"),
        pytest.param(flipped(segment(1), -1), 6, 8, "step 5: its checksum", id="before-the-snapshot"),
        pytest.param(flipped(segment(0), -1), 6, 8, "step 2: its checksum", id="long-before"),
        pytest.param(gone(segment(0)), 6, 8, "the segments before it are missing", id="first-segment-gone"),
        pytest.param(both(gone(segment(1)), gone("snapshots")), 0, 3, "does not continue", id="gap"),
        pytest.param(both(gone(segment(2)), cut(segment(1), SIZE)), 3, 5, "step-00000006 lies", id="cut-in-between"),
        pytest.param(
            both(gone(segment(2)), gone(segment(1)), cut(segment(0), SIZE + 9)), 0, 1, "step-00000003", id="cut-at-two"
        ),
        pytest.param(both(flipped(segment(1), -SIZE - 1), gone("snapshots")), 0, 4, "step 4: its", id="middle"),
        pytest.param(both(flipped(segment(0), -1), flipped(NEW_WEIGHTS, -1)), 3, 8, "step 2", id="journal-and-newest"),
        pytest.param(
            both(flipped(segment(1), -1), flipped(f"{NEW}/COMMIT", 0)), 3, 5, "step 5", id="nothing-bridges-the-gap",
        ),
    ],
)  # fmt: skip
def test_a_damaged_run_falls_back_and_ends_the_same(
    damage: Damage, start: int, step: int, words: str | None, recorded: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    damage(run)
    digest, resumed, said = resume(run, LAST)
    assert resumed.step == step
    assert resumed.snapshot == (run / "snapshots" / f"step-{start:08d}" if start else None)
    assert digest == digests()[LAST]
    assert any(words in text for text in said) if words is not None else said == []
    history = read_journal(run / "journal")
    if history.steps == LAST:
        assert replayed(run) == digests()[LAST]
    else:
        assert start > history.steps
    digest, resumed, _ = resume(run, LAST + 2)
    assert (resumed.step, digest) == (LAST, digests()[LAST + 2])


def test_what_cannot_be_mended_is_refused(recorded: Path, tmp_path: Path) -> None:
    for name, damages in (
        ("no-header", [flipped(segment(number), 30) for number in range(3)]),
        ("no-base", [flipped(segment(0), 30), gone("snapshots")]),
    ):
        shutil.copytree(recorded, tmp_path / name)
        both(*damages)(tmp_path / name)
        with pytest.raises(CorruptRunError, match=r"000000\.zoj: the header's checksum is wrong"):
            open_engine(run_dir=tmp_path / name)


@pytest.mark.parametrize("place", [-1, 3, 20], ids=["weights", "length", "names"])
def test_a_snapshot_that_is_damaged_while_the_run_goes_on_is_set_aside(place: int, tmp_path: Path) -> None:
    engine, said = open_engine(), list[str]()
    open_run(engine, tmp_path, Options(JournalConfig(snapshot_replay_s=1e9, audit_every=1), warn=said.append))
    walk(engine, 2)
    durability(engine).snapshot()
    durability(engine).wait()
    flip(tmp_path / "snapshots" / "step-00000002" / "model.safetensors", place)
    assert walk(engine, LAST) == digests()[LAST]
    assert len(said) == 1
    assert "set aside" in said[0]
    assert durability(engine).repaired == 0


# Who may go on


@pytest.mark.parametrize(
    ("change", "diff"),
    [
        ({"run_seed": 4}, "run_seed: 3 -> 4"),
        ({"num_directions": 5}, "num_directions: 4 -> 5"),
        ({"noise": "factored"}, "noise: dense -> factored"),
        ({"estimator": "mezo"}, "estimator: fzoo -> mezo"),
        ({"coefficient_cap": 0.5}, "coefficient_cap: 1.0 -> 0.5"),
    ],
)
def test_other_mathematics_needs_a_fork(change: dict[str, Any], diff: str, tmp_path: Path) -> None:
    walk(first := open_engine(run_dir=tmp_path), 3)
    first.close_journal()
    with pytest.raises(ConfigError, match="made with other mathematics") as caught:
        open_run(open_engine(**change), tmp_path)
    assert caught.value.why == diff
    fork = open_engine(**change)
    open_run(fork, tmp_path, Options(ALWAYS, fork=True))
    assert (fork.steps_done, fork.digest()) == (3, digests()[3])
    walk(fork, 6)
    fork.close_journal()
    history = read_journal(tmp_path / "journal")
    assert history.whole
    assert replayed(tmp_path) == fork.digest()
    assert (fork.digest() == digests()[6]) == ("coefficient_cap" in change)
    assert replayed(tmp_path, steps=3) == digests()[3]
    with pytest.raises(ConfigError, match="made with other mathematics"):
        open_run(open_engine(), tmp_path)
    for snapshots in (True, False):
        again = open_engine(**change)
        assert (open_run(again, tmp_path).snapshot is not None) == snapshots
        assert again.digest() == fork.digest()
        again.close_journal()
        shutil.rmtree(tmp_path / "snapshots", ignore_errors=True)


def test_a_run_can_be_forked_again_and_back(tmp_path: Path) -> None:
    seeds, wanted = (3, 4, 3, 5), list[str]()
    for number, seed in enumerate(seeds):
        engine = open_engine(run_seed=seed)
        open_run(engine, tmp_path, Options(NEVER, fork=True))
        wanted.append(walk(engine, 2 * number + 2))
        engine.close_journal()
    assert [replayed(tmp_path, steps=2 * number + 2) for number in range(4)] == wanted
    assert [part.header.run_seed for part in read_journal(tmp_path / "journal").segments] == list(seeds)


@pytest.mark.parametrize("fork", [False, True])
def test_other_base_weights_are_refused(fork: bool, tmp_path: Path) -> None:
    walk(first := open_engine(run_dir=tmp_path), 2)
    first.close_journal()
    for other in (open_engine(seed=1), open_engine(dtype=torch.bfloat16)):
        with pytest.raises(CorruptRunError, match="started from other weights"):
            open_run(other, tmp_path, Options(fork=fork))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = open_engine(run_dir=tmp_path)
    with pytest.raises(MachineError, match="used by another process"):
        open_engine(run_dir=tmp_path)
    assert walk(first, 2) == digests()[2]
    first.close_journal()
    assert open_engine(run_dir=tmp_path).steps_done == 2


def test_a_refused_start_leaves_the_directory_free(tmp_path: Path) -> None:
    walk(first := open_engine(run_dir=tmp_path), 2)
    first.close_journal()
    with pytest.raises(ConfigError) as caught:
        open_engine(run_dir=tmp_path, run_seed=4)
    assert open_engine(run_dir=tmp_path).steps_done == 2
    assert "run_seed: 3 -> 4" in caught.value.why


# What else is carried over


@pytest.mark.parametrize("settings", [NEVER, ALWAYS], ids=["base", "snapshot"])
def test_skips_in_a_row_count_over_restarts(settings: JournalConfig, tmp_path: Path) -> None:
    bad = {**units(0)[0], "factor": math.nan}
    said = 0
    for steps in ((True, False, False), (False,), (False,), ()):
        engine = open_engine(max_consecutive_skips=5)
        open_run(engine, tmp_path, Options(settings))
        for good in steps:
            engine.step(units(0) if good else bad)
        durability(engine).wait()
        said += len(steps)
        if not steps:
            with pytest.raises(NonFiniteError, match="the last 5 steps were all skipped"):
                engine.step(bad)
        engine.close_journal()
    again = open_engine(max_consecutive_skips=5)
    open_run(again, tmp_path)
    assert again.steps_done == said + 1
    with pytest.raises(NonFiniteError, match="the last 5 steps"):
        again.step(bad)
    again.close_journal()
    cured = open_engine(max_consecutive_skips=5)
    open_run(cured, tmp_path)
    for batch in (units(0), bad, bad, bad, bad):
        cured.step(batch)


def test_a_journal_grows_beyond_its_space_where_the_length_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_ds.journal.journal._SPARE_RECORDS", 2)
    sizes: list[int] = []
    for last in (3, 8, LAST):
        engine = open_engine(run_dir=tmp_path)
        while engine.steps_done < last:
            engine.step(units(engine.steps_done))
            sizes.append((tmp_path / segment(0)).stat().st_size)
        engine.close_journal()
    head = (tmp_path / segment(0)).stat().st_size - LAST * SIZE
    spare = [(size - head) // SIZE - step - 1 for step, size in enumerate(sizes)]
    assert set(spare) == {0, 1}
    assert engine.digest() == replayed(tmp_path) == digests()[LAST]


def test_records_that_were_not_synced_count_after_a_crash(tmp_path: Path) -> None:
    engine = open_engine()
    open_run(engine, tmp_path, Options(JournalConfig(sync_every=4)))
    walk(engine, 6)
    assert resume(tmp_path, LAST)[0] == digests()[LAST]


def test_ranks_count_skips_alike_whatever_they_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {**units(0)[0], "factor": math.nan}
    first = open_engine()
    open_run(first, tmp_path, Options(ALWAYS))
    for batch in (units(0), bad, bad):
        first.step(batch)
        durability(first).wait()
    first.close_journal()
    models = [tiny_model("llama") for _ in range(2)]
    here = threading.local()
    monkeypatch.setattr("zo_ds.engine.resume._usable", lambda *_: not here.blind)

    def work(channel: Channel) -> None:
        here.blind = channel.rank == 1
        engine = open_engine(channel=channel, model=models[channel.rank], max_consecutive_skips=3)
        open_run(engine, tmp_path)
        engine.step([bad])

    assert [type(error) for error in on_ranks(2, work)] == [NonFiniteError, NonFiniteError]


def test_no_step_is_recorded_on_weights_that_were_put_there(tmp_path: Path) -> None:
    engine = open_engine(run_dir=tmp_path)
    walk(engine, 2)
    engine.load_weights(weights_of(open_engine(seed=1)))
    with pytest.raises(ConfigError, match="the weights were replaced"):
        walk(engine, 3)
    assert len(read_journal(tmp_path / "journal").records()) == 2


def test_whatever_goes_wrong_with_a_snapshot_training_goes_on(tmp_path: Path) -> None:
    engine, said = open_engine(), list[str]()

    def refuse(folder: Path) -> None:
        raise ValueError("generation_config is invalid")

    open_run(engine, tmp_path, Options(ALWAYS, extras=refuse, warn=said.append))
    assert walk(engine, 4) == digests()[4]
    engine.close_journal()
    assert said
    assert set(said) == {"no snapshot: generation_config is invalid; training goes on, the journal is safe"}


def test_a_snapshot_with_another_state_hash_is_set_aside(tmp_path: Path) -> None:
    """As if a bit had flipped between hashing the weights and writing them."""
    engine = open_engine()
    open_run(engine, tmp_path, Options(NEVER))
    walk(engine, 3)
    durability(engine).snapshot(state_hash=1)
    engine.close_journal()
    with pytest.raises(CorruptRunError, match="not those that it was made of"):
        open_run(open_engine(), tmp_path)
    assert resume(tmp_path, LAST)[0] == digests()[LAST]
