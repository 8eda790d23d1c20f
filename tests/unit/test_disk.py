"""Weights on disk: the same bits as in memory, whoever looks and whatever is still to be applied; a bad disk is met."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zo_ds
from tests.conftest import STORES, tiny_model, weights_of, zo_batch
from tests.unit.test_resume import ALWAYS, LAST, digests, durability, open_engine, units, walk
from tests.unit.test_stores import Attending, Recurrent, Tied, copies, trace  # noqa: F401  # copies is a fixture
from tests.unit.test_stores import open_engine as open_plain
from zo_ds.config.schema import JournalConfig
from zo_ds.engine.audit import Auditor
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.resume import Options, open_run
from zo_ds.errors import ConfigError, MachineError
from zo_ds.journal.history import read_journal
from zo_ds.journal.snapshot import committed, verify
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.update import Term, Update
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import Stored, Traffic
from zo_ds.stores.disk import DiskFile, Extent, Pending
from zo_ds.stores.homes import aligned, nameless_file
from zo_ds.tensor_files import folder_files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nvme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder on the disk, and the store that lies there; no file or thread outlives the test."""
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}
    monkeypatch.setitem(STORES, "nvme", {"stage": 3, "offload_param": offload})
    opened: list[DiskFile] = []
    begin = DiskFile.__init__

    def begin_and_note(self: DiskFile, *args: Any) -> None:
        begin(self, *args)
        opened.append(self)

    monkeypatch.setattr(DiskFile, "__init__", begin_and_note)
    yield f"nvme:{tmp_path / 'nvme'}"
    for file in opened:
        file.close()


def file_of(engine: ZOEngine) -> DiskFile:
    store: Any = engine.store
    found: DiskFile = store._file
    return found


def settle(engine: ZOEngine) -> Traffic:
    """Let what is read ahead arrive; what has been moved until then."""
    wait(list(file_of(engine)._coming.values()))
    return engine.store.traffic.copy()


def extent_of(engine: ZOEngine, name: str) -> Extent:
    return file_of(engine)._extents[name]


def update(step: int, terms: int = 2) -> Plan:
    return Plan.of(5, [Update(step, tuple(Term(step, i, 0.01 * (i + 1)) for i in range(terms)), 1e-3)])


# The same bits


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, "dense"), (torch.bfloat16, "factored")])
def test_the_same_steps_as_in_memory(dtype: torch.dtype, noise: str) -> None:
    batches = [[zo_batch(seed=2 * step), zo_batch(seed=2 * step + 1)] for step in range(4)]
    wanted = trace(open_plain(tiny_model("llama", dtype=dtype), "resident", noise), batches)
    assert trace(open_plain(tiny_model("llama", dtype=dtype), "nvme", noise), batches) == wanted


@pytest.mark.parametrize(("dtype", "forward"), [(torch.float32, "sequential"), (torch.bfloat16, "batched")])
def test_the_same_where_gathered_weights_are_the_buffers(dtype: torch.dtype, forward: str, nvme: str) -> None:
    engines = [open_engine(store, dtype, forward=forward) for store in ("resident", nvme)]
    one, other = ([walk(engine, last) for last in (2, 4)] for engine in engines)
    assert one == other


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("family", ["opt", "bert", "gpt2"])
def test_other_families_take_the_same_steps(family: str) -> None:
    batches = [zo_batch(family, seed=step) for step in range(4)]
    wanted = trace(open_plain(tiny_model(family), "resident", "factored"), batches)
    assert trace(open_plain(tiny_model(family), "nvme", "factored"), batches) == wanted


class Odd(nn.Module):
    """Uses a weight twice, one of its own between modules, one never; some have no or one element."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = nn.Linear(8, 8), nn.Linear(3, 3)
        self.own, self.one, self.none = (nn.Parameter(torch.ones(n)) for n in (8, 1, 0))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.sin(ids[:, None] * torch.arange(1.0, 9.0))
        return (self.inner(torch.tanh(self.inner(x)) * self.own) * self.one).pow(2).mean(1)


@pytest.mark.parametrize("like_cuda", [False, True], ids=["shards", "copies"])
@pytest.mark.parametrize("kind", [Tied, Recurrent, Attending, Odd])
def test_awkward_modules_take_the_same_steps(
    kind: type[nn.Module], like_cuda: bool, request: pytest.FixtureRequest
) -> None:
    if like_cuda:
        request.getfixturevalue("copies")
    batches = [torch.arange(start, start + 5) % 8 for start in range(4)]
    found = []
    for store in ("resident", "nvme"):
        torch.manual_seed(1)
        found.append(trace(open_plain(kind(), store, loss_fn=lambda m, ids: m(ids)), batches))
    assert found[0] == found[1]


def test_a_failed_forward_leaves_the_weights_usable() -> None:
    engine, other = open_plain(tiny_model("llama"), "nvme"), open_plain(tiny_model("llama", seed=2))
    bad = {**zo_batch(), "input_ids": torch.full((4, 8), 10_000)}
    for _ in range(2):
        with pytest.raises(IndexError):
            engine.step(bad)
    assert trace(engine, [zo_batch()]) == trace(open_plain(tiny_model("llama")), [zo_batch()])
    with pytest.raises(IndexError):
        engine.step(bad)
    engine.load_weights(weights_of(other))
    assert torch.equal(engine.losses(zo_batch()), other.losses(zo_batch()))


# Updates that are still to be applied


LOOKS: dict[str, Callable[[ZOEngine, Path], Any]] = {
    "losses": lambda engine, path: engine.losses(units(9)[0]).tolist(),
    "call": lambda engine, path: engine.call(lambda m, b: m(**b).logits, {"input_ids": torch.arange(8)[None]}).tolist(),
    "digest": lambda engine, path: engine.digest(),
    "state_hash": lambda engine, path: engine.store.state_hash(),
    "views": lambda engine, path: [
        (name, (held.read() if isinstance(held, Stored) else held).tolist()) for name, held in engine.store.views()
    ],
    "next step": lambda engine, path: (engine.step(units(2)).clean_loss, engine.digest()),
    "save_pretrained": lambda engine, path: saved(engine, path),
}


def saved(engine: ZOEngine, path: Path) -> list[Any]:
    engine.save_pretrained(path / "saved")
    return [(name, tensor.tolist()) for name, tensor in folder_files(path / "saved").tensors()]


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_sees_the_update(look: str, tmp_path: Path, nvme: str) -> None:
    found = []
    for store in ("resident", nvme):
        engine = open_engine(store, noise="factored")
        before = LOOKS[look](engine, tmp_path) if look not in ("next step", "views") else None
        for step in range(2):
            engine.step(units(step))
        found.append(LOOKS[look](engine, tmp_path))
        assert found[-1] != before
    assert found[0] == found[1]


def test_a_snapshot_has_the_update(tmp_path: Path, nvme: str) -> None:
    engine = open_engine(nvme)
    open_run(engine, tmp_path, Options(ALWAYS))
    walk(engine, 3)
    engine.step(units(3))
    durability(engine).snapshot()
    durability(engine).wait()
    (folder,) = [folder for folder in committed(tmp_path / "snapshots") if verify(folder).step == 4]
    fresh = open_engine()
    fresh.load_weights(dict(folder_files(folder).tensors()))
    assert fresh.digest() == digests()[4]
    engine.close_journal()


def test_an_audit_sees_the_update(tmp_path: Path, nvme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_ds.engine.audit.BLOCK_ELEMENTS", 200)
    audits = mock.Mock(side_effect=Auditor.audit, autospec=Auditor.audit)
    monkeypatch.setattr(Auditor, "audit", lambda *given: audits(*given))
    engine, said = open_engine(nvme), list[str]()
    open_run(engine, tmp_path, Options(JournalConfig(snapshot_replay_s=1e9, audit_every=1), warn=said.append))
    walk(engine, 1)
    durability(engine).snapshot()
    durability(engine).wait()
    assert walk(engine, 8) == digests()[8]
    assert audits.call_count >= 6
    assert (durability(engine).repaired, said) == (0, [])
    engine.close_journal()


@pytest.mark.parametrize("whole", [True, False], ids=["mapping", "source"])
def test_loaded_weights_do_not_get_an_older_update(whole: bool, nvme: str) -> None:
    engine, other = open_engine(nvme), open_engine()
    other.load_weights(weights_of(open_engine(seed=2)))
    for step in range(3):
        engine.step(units(step))
    engine.went_on(0, [])
    new = weights_of(other)
    engine.load_weights(new if whole else lambda name, start, out: out.copy_(new[name].view(-1)[start:][: len(out)]))
    assert engine.digest() == other.digest()
    assert torch.equal(engine.losses(units(0)[0]), other.losses(units(0)[0]))
    one, same = (e.step(units(7)).coefficients.tolist() for e in (engine, other))
    assert (one, engine.digest()) == (same, other.digest())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_updates_wait_at_once_whatever_their_structure(dtype: torch.dtype, nvme: str) -> None:
    structures = [NoiseStructure.DENSE, NoiseStructure.FACTORED, NoiseStructure.FACTORED, NoiseStructure.DENSE, None]
    found = []
    for store in ("resident", nvme):
        engine = open_engine(store, dtype)
        engine.losses(units(0)[0])
        for step, structure in enumerate(structures):
            engine.store.apply(update(step), structure)
        seen = engine.losses(units(0)[0]).tolist()
        for step, structure in enumerate(structures[:2]):
            engine.store.apply(update(10 + step), structure)
        found.append((seen, engine.store.state_hash(), engine.digest()))
    assert found[0] == found[1]
    assert not file_of(engine)._pending[: -len(structures)]


# What is moved


def sizes(engine: ZOEngine) -> tuple[int, int, int]:
    """Bytes of all shards, of the trained ones, of the largest."""
    extents = file_of(engine)._extents.values()
    trained = sum(extent.nbytes for extent in extents if extent.info is not None)
    return sum(extent.nbytes for extent in extents), trained, max(extent.nbytes for extent in extents)


@pytest.mark.parametrize("frozen", ["", "mlp", "embed_tokens"])
def test_a_step_reads_and_writes_every_shard_once(frozen: str, nvme: str) -> None:
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    engine = open_engine(nvme, model=model)
    for step in range(3):  # the last one's update waits, as it will in the end
        engine.step(units(step))
    every, trained, largest = sizes(engine)
    # The table is the head as well: it comes by twice, at both ends of a forward, and others lie between.
    head = extent_of(engine, "model.embed_tokens.weight").nbytes
    before, steps = settle(engine), 6
    outputs = [engine.step(units(3 + step)) for step in range(steps)]
    moved = settle(engine).since(before)
    assert all(output.skip is None for output in outputs)
    assert moved.disk_written == steps * trained
    # An update throws away what was read ahead of it, which is less than two shards.
    assert steps * (every + head) <= moved.disk_read <= steps * (every + head + largest)
    assert sum(output.traffic.disk_read for output in outputs) <= moved.disk_read
    assert (trained < every) == bool(frozen)


def test_a_skipped_step_writes_nothing(nvme: str) -> None:
    engine = open_engine(nvme)
    digest = walk(engine, 3)
    engine.losses(units(0)[0])
    before = settle(engine)
    output = engine.step([{**units(3)[0], "factor": float("nan")}])
    assert output.skip is not None
    assert settle(engine).since(before).disk_written == 0
    assert engine.digest() == digest


def test_looking_writes_nothing_twice(tmp_path: Path, nvme: str) -> None:
    engine = open_engine(nvme)
    walk(engine, 3)
    before = settle(engine)
    for look in ("losses", "digest", "state_hash", "views", "save_pretrained"):
        LOOKS[look](engine, tmp_path)
    assert settle(engine).since(before).disk_written == 0


@contextmanager
def counted_buffers() -> Iterator[list[int]]:
    """[bytes of buffers that are alive, the most there were]."""
    real, seen, lock = torch.empty, [0, 0], threading.Lock()

    def drop(nbytes: int) -> None:
        seen[0] -= nbytes

    def empty(*size: Any, **how: Any) -> Tensor:
        if "pin_memory" not in how:
            return real(*size, **how)
        memory = np.zeros(size[0] + 64, np.uint8)
        weakref.finalize(memory, drop, size[0])
        with lock:
            seen[0] += size[0]
            seen[1] = max(seen)
        first = -memory.ctypes.data % 64
        return torch.from_numpy(memory)[first : first + size[0]]

    with mock.patch.object(torch, "empty", empty):
        yield seen


def layers_model(count: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(count)])


def open_own(model: nn.Module, store: str = "nvme", **options: Any) -> ZOEngine:
    options = {"num_directions": 4, "lr": 1e-3, "run_seed": 2, **options}
    config = {"zero_optimization": STORES[store], "zeroth_order": options}
    return zo_ds.initialize(model, config, loss_fn=lambda m, x: m(x).pow(2).mean(1))


def most_alive(model: nn.Module, forward: str) -> tuple[int, int]:
    with counted_buffers() as seen:
        engine = open_own(model, forward=forward)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            engine.step(x)
        engine.losses(x)
        engine.digest()
        settle(engine)
    return seen[1], sizes(engine)[2]


@pytest.mark.parametrize("forward", ["batched", "sequential"])
def test_memory_for_what_is_in_use_and_what_comes_next(forward: str) -> None:
    found, largest = most_alive(layers_model(), forward)
    assert 2 * largest <= found <= 4 * largest


@pytest.mark.parametrize("forward", ["batched", "sequential"])
def test_memory_is_bounded_where_shards_have_many_sizes(forward: str, nvme: str) -> None:
    """In use, on its way, and kept for the next; a fourth while somebody still has a view of one."""
    with counted_buffers() as seen:
        engine = open_engine(nvme, forward=forward)
        walk(engine, 3)
        engine.losses(units(0)[0])
        settle(engine)
    assert seen[1] <= 4 * sizes(engine)[2]


def test_pending_updates_are_forgotten_when_all_have_had_them(nvme: str) -> None:
    engine = open_engine(nvme)
    for step in range(6):
        engine.step(units(step))
    assert len(file_of(engine)._pending) <= 2


# A bad disk


class Disk:
    """Stands before `os.preadv` and `os.pwrite` where they concern weights.

    Args:
        call: which of the two goes wrong.
        thread: main, ahead (the threads of the file) or any.
        effect: gets the real call and what it was given.
        times: so often.
    """

    def __init__(self, call: str, thread: str, effect: Callable[..., int], times: int = 1) -> None:
        self.call, self.thread, self.effect, self.left, self.hits = call, thread, effect, times, 0
        self.real = getattr(os, call)

    def __call__(self, handle: int, data: Any, offset: int) -> int:
        ahead = threading.current_thread().name.startswith("zo_ds disk")
        mine = "zo_ds-weights-" in os.readlink(f"/proc/self/fd/{handle}")
        if mine and self.left and self.thread in ("any", "ahead" if ahead else "main"):
            self.left, self.hits = self.left - 1, self.hits + 1
            return int(self.effect(self.real, handle, data, offset))
        return int(self.real(handle, data, offset))

    def watching(self) -> Any:
        return mock.patch.object(os, self.call, self)


def refuse(code: int) -> Callable[..., int]:
    def effect(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return effect


def half(real: Callable[..., int], handle: int, data: Any, offset: int) -> int:
    """Half of what was asked for, or less."""
    if isinstance(data, list):
        return real(handle, [data[0][: max(1, len(data[0]) // 2)]], offset)
    return real(handle, data[: max(1, len(data) // 3)], offset)


def met(engine: ZOEngine, thread: str) -> MachineError:
    """Come to where the disk is bad, by the threads' way or the caller's own."""
    with pytest.raises(MachineError) as caught:
        engine.digest() if thread == "main" else walk(engine, engine.steps_done + 3)
    assert caught.value.exit_code == 4
    return caught.value


def check_named(error: MachineError, verb: str, folder: Path, name: str = "") -> None:
    assert error.what == f"cannot {verb} weights on disk"
    assert f"'{name}" in error.where
    assert ("model." in error.where) == name.startswith("model") or not name
    assert str(folder) in error.where
    assert error.why
    assert "same command goes on" in error.remedy


def check_goes_on(run: Path, nvme: str, steps: int) -> None:
    history = read_journal(run / "journal")
    assert (history.whole, history.steps) == (True, steps)
    again = open_engine(nvme, run_dir=run)
    assert again.steps_done == steps
    assert walk(again, LAST) == digests()[LAST]
    again.close_journal()


@pytest.mark.parametrize("thread", ["main", "ahead"])
@pytest.mark.parametrize(("call", "verb"), [("preadv", "read"), ("pwrite", "write")])
def test_a_disk_that_fails_ends_the_run_which_goes_on(
    call: str, verb: str, thread: str, tmp_path: Path, nvme: str
) -> None:
    engine = open_engine(nvme, run_dir=tmp_path / "run")
    walk(engine, 3)
    engine.step(units(3))
    disk = Disk(call, thread, refuse(errno.EIO), times=100)
    with disk.watching():
        error = met(engine, thread)
    assert disk.hits
    check_named(error, verb, tmp_path / "nvme")
    assert error.why == "Input/output error"
    steps = engine.steps_done
    assert steps < LAST - 1
    engine.close_journal()
    engine.store.close()
    check_goes_on(tmp_path / "run", nvme, steps)


@pytest.mark.parametrize("effect", [half, refuse(errno.EINTR)], ids=["short", "EINTR"])
@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_short_and_interrupted_calls_are_gone_on_with(call: str, effect: Callable[..., int], nvme: str) -> None:
    disk = Disk(call, "any", effect, times=500)
    with disk.watching():
        assert walk(open_engine(nvme), 3) == digests()[3]
    assert disk.hits > 40


def test_a_file_that_was_cut_off_is_met(tmp_path: Path, nvme: str) -> None:
    engine = open_engine(nvme)
    walk(engine, 2)
    settle(engine)
    extent = extent_of(engine, "model.norm.weight")
    os.ftruncate(file_of(engine)._handle, extent.offset + extent.nbytes // 2)
    with pytest.raises(MachineError) as caught:
        engine.digest()
    assert "cut off" in caught.value.why
    check_named(caught.value, "read", tmp_path / "nvme", "model.norm.weight")


@pytest.mark.parametrize(("thread", "at", "trained"), [("main", 0, True), ("ahead", -1, True), ("ahead", 100, False)])
def test_a_flipped_bit_is_met_and_the_run_goes_on(
    at: int, thread: str, trained: bool, tmp_path: Path, nvme: str
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model = tiny_model("llama")
    model.get_parameter(name).requires_grad_(trained)
    engine = open_engine(nvme, run_dir=tmp_path / "run", model=model)
    walk(engine, 3)
    engine.step(units(3))
    settle(engine)
    extent, handle = extent_of(engine, name), file_of(engine)._handle
    place = extent.offset + at % extent.nbytes
    os.pwrite(handle, bytes([os.pread(handle, 1, place)[0] ^ 8]), place)
    if thread == "main":
        with pytest.raises(MachineError) as caught, engine.store.whole(model.get_parameter(name)):
            pass
        error = caught.value
    else:
        error = met(engine, thread)
    check_named(error, "read", tmp_path / "nvme", name)
    assert "not those that were written" in error.why
    engine.close_journal()
    if trained:
        check_goes_on(tmp_path / "run", nvme, engine.steps_done)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("store", ["zero3", "zero3-cpu", "nvme"])
def test_what_deepspeed_fetched_ahead_is_dropped_after_a_failed_forward(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STORES, store, {**STORES[store], "stage3_prefetch_bucket_size": 10**6})
    engine, other = open_plain(tiny_model("llama"), store), open_plain(tiny_model("llama", seed=2))
    reference = open_plain(tiny_model("llama"))
    assert trace(engine, [zo_batch(), zo_batch(seed=1)]) == trace(reference, [zo_batch(), zo_batch(seed=1)])
    with pytest.raises(IndexError):
        engine.step({**zo_batch(), "input_ids": torch.full((4, 8), 10_000)})
    engine.load_weights(weights_of(other))
    assert torch.equal(engine.losses(zo_batch()), other.losses(zo_batch()))
    assert engine.digest() == other.digest()


def test_a_disk_that_comes_back_costs_nothing(nvme: str) -> None:
    engine = open_engine(nvme)
    walk(engine, 3)
    engine.step(units(3))
    with Disk("preadv", "any", refuse(errno.EIO), times=100).watching(), pytest.raises(MachineError):
        engine.digest()
    assert engine.digest() == digests()[4]
    assert walk(engine, 6) == digests()[6]


@pytest.mark.parametrize("thread", ["main", "ahead"])
def test_an_update_that_could_not_be_written_is_not_lost(thread: str, nvme: str) -> None:
    engine = open_engine(nvme)
    walk(engine, 3)
    settle(engine)
    with Disk("pwrite", thread, refuse(errno.EIO), times=1).watching():
        engine.step(units(3))
        settle(engine)
        if thread == "main":
            with pytest.raises(MachineError):
                engine.digest()
    # Another order than the forward's: what was read ahead, and failed, is thrown away.
    engine.store.state_hash()
    assert engine.digest() == digests()[4]


def test_what_is_written_is_not_read_ahead_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    engine = open_own(nn.Linear(8, 8, bias=False))
    x = torch.randn(4, 8)
    for _ in range(4):
        engine.step(x)
    write = DiskFile.write

    def write_slowly(file: DiskFile, extent: Extent, buffer: Tensor) -> None:
        settle(engine)
        write(file, extent, buffer)

    monkeypatch.setattr(DiskFile, "write", write_slowly)
    engine.load_weights({"weight": torch.eye(8)})
    assert torch.allclose(engine.losses(x).float(), x.pow(2).mean(1))


@pytest.mark.parametrize("then", ["load", "apply"])
def test_what_was_fetched_before_a_fetch_failed_is_not_kept(then: str, nvme: str) -> None:
    """A module with two parameters: the first one is here when the second cannot be read."""
    torch.manual_seed(0)
    engine = open_own(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    x = torch.randn(4, 8)
    bias = extent_of(engine, "0.bias")

    def bad(real: Callable[..., int], handle: int, data: Any, offset: int) -> int:
        if offset == bias.offset:
            raise OSError(errno.EIO, "bad")
        return real(handle, data, offset)

    with Disk("preadv", "any", bad, times=1000).watching(), pytest.raises(MachineError):
        engine.losses(x)
    new = {name: torch.eye(8) if "weight" in name else torch.zeros(8) for name in file_of(engine)._extents}
    if then == "load":
        engine.load_weights(new)
        assert torch.allclose(engine.losses(x).float(), x.pow(2).mean(1))
    else:
        engine.store.apply(update(0))
        seen, same = engine.losses(x).tolist(), engine.losses(x).tolist()
        assert seen == same


def test_snapshots_become_due_as_with_other_stores(tmp_path: Path, nvme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = ops.apply_

    def slowly(*given: Any) -> None:
        time.sleep(0.1)
        apply(*given)

    monkeypatch.setattr(ops, "apply_", slowly)
    found = []
    for store in ("zero3", "nvme"):
        engine, run = open_own(nn.Linear(8, 8, bias=False), store=store), tmp_path / store
        open_run(engine, run, Options(JournalConfig(snapshot_replay_s=0.25, hash_every=1)))
        for _ in range(5):
            engine.step(torch.ones(4, 8))
        engine.close_journal()
        found.append(bool(list((run / "snapshots").glob("*"))))
    assert found == [True, True]


# No room


def linear() -> nn.Module:
    return nn.Linear(128, 256)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("this user may not mount anything")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refused(folder: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(STORES["nvme"]["offload_param"], "nvme_path", str(folder))
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(kind) as caught:
        open_own(linear())
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert str(folder) in caught.value.where
    assert "nvme_path" in caught.value.where
    assert caught.value.remedy
    return caught.value


def test_a_full_disk_is_noticed_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        error = refused(disk / "weights", MachineError, monkeypatch)
        assert error.exit_code == 4
        assert "No space left" in error.what
        assert os.statvfs(disk).f_bfree >= 15
        monkeypatch.setitem(STORES["nvme"]["offload_param"], "nvme_path", str(disk / "weights"))
        engine = open_own(nn.Linear(32, 32))
        assert engine.step(torch.randn(4, 32)).skip is None
        engine.store.close()


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        assert "Read-only" in refused(disk, MachineError, monkeypatch).what
        assert "Read-only" in refused(disk / "weights", MachineError, monkeypatch).what


def test_a_disk_that_is_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(tmp_path / "no" / "weights", ConfigError, monkeypatch)
    assert "does not exist" in error.why
    assert not (tmp_path / "no").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", MachineError, monkeypatch)
    refused(tmp_path / "file" / "weights", ConfigError, monkeypatch)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_in_the_folder(tmp_path: Path, nvme: str) -> None:
    walk(open_engine(nvme), 1)
    assert list((tmp_path / "nvme").iterdir()) == []


# The file by itself, against tensors in memory

INFOS = [
    ParamInfo("a", (12, 9), torch.float32),
    ParamInfo("b", (40,), torch.float32),
    ParamInfo("c", (7, 16), torch.bfloat16),
    ParamInfo("d", (6, 5), torch.float16),
    ParamInfo("e", (1,), torch.float32),
    ParamInfo("f", (64, 2), torch.bfloat16),
]
FROZEN = {"b": None, "d": None}
WHICH = st.integers(0, len(INFOS) - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("forward"), st.permutations(range(len(INFOS)))),
    st.tuples(st.just("fetch"), WHICH, st.booleans()),
    st.tuples(st.just("apply"), st.sampled_from(list(NoiseStructure))),
    st.tuples(st.just("apply"), st.sampled_from(list(NoiseStructure))),
    st.tuples(st.just("copy"), WHICH),
    st.tuples(st.just("copies beside"), WHICH),
)
WRITES = st.tuples(st.just("write"), WHICH)


def value(info: ParamInfo, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(info.numel, generator=generator).to(info.dtype)


class Twin:
    """A file of shards, and what must be in it."""

    def __init__(self, folder: Path, count: int, eager: bool) -> None:
        self.infos, self.eager = INFOS[:count], eager
        with nameless_file(folder, sum(aligned(4 * info.numel) for info in self.infos)) as handle:
            self.file = DiskFile(handle, folder, Traffic())
        self.wanted = [value(info, 0) for info in self.infos]
        self.extents = []
        for info, tensor in zip(self.infos, self.wanted, strict=True):
            trained = None if info.name in FROZEN else info
            self.extents.append(self.file.add(info.name, info.numel, info.numel, info.dtype, 0, trained))
            self.file.write(self.extents[-1], tensor)
        self.steps = 0
        self.kept: list[tuple[Tensor, Tensor]] = []

    def do(self, action: tuple[Any, ...]) -> None:
        kind, *given = action
        count = len(self.infos)
        if kind == "forward":
            for which in given[0]:
                if which < count:
                    self.fetch(which)
        elif kind == "fetch":
            self.fetch(given[0] % count, given[1])
        elif kind == "apply":
            plan = update(self.steps)
            self.steps += 1
            self.file.update(Pending(plan, given[0]))
            for extent, tensor in zip(self.extents, self.wanted, strict=True):
                if extent.info is not None:
                    ops.apply_([tensor], [extent.info.site(given[0])], plan)
        elif kind == "copy":
            assert torch.equal(self.file.copy(self.extents[given[0] % count]), self.wanted[given[0] % count])
        elif kind == "copies beside":
            self.beside(given[0] % count)
        else:
            self.write(given[0] % count)
        if self.eager:
            wait(list(self.file._coming.values()))
        assert all(torch.equal(view, as_it_was) for view, as_it_was in self.kept)

    def fetch(self, which: int, keep: bool = False) -> None:
        buffer = self.file.read(self.extents[which])
        assert torch.equal(buffer, self.wanted[which]), self.infos[which].name
        if keep:
            self.kept.append((buffer.view(-1), buffer.clone()))
        self.file.give_back(self.extents[which], buffer)

    def beside(self, which: int) -> None:
        """Another thread copies everything while forwards go on here."""
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.extend(self.file.copy(extent) for extent in self.extents))
        thread.start()
        for _ in range(2):
            self.fetch(which)
            self.fetch((which + 1) % len(self.infos))
        thread.join()
        assert all(torch.equal(one, other) for one, other in zip(found, self.wanted, strict=True))

    def write(self, which: int) -> None:
        self.steps += 1
        buffer = self.file.read(self.extents[which])
        buffer.copy_(value(self.infos[which], self.steps))
        self.wanted[which] = buffer.clone()
        if self.eager:
            wait(list(self.file._coming.values()))
        self.file.write(self.extents[which], buffer)
        self.file.give_back(self.extents[which], buffer)


def check_twin(count: int, eager: bool, actions: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        twin = Twin(Path(folder), count, eager)
        try:
            for action in actions:
                twin.do(action)
            for which in range(count):
                twin.fetch(which)
        finally:
            twin.file.close()


@settings(max_examples=40)
@given(st.integers(1, len(INFOS)), st.booleans(), st.lists(ACTIONS, max_size=14))
def test_whatever_is_done_the_file_is_what_memory_would_be(
    count: int, eager: bool, actions: list[tuple[Any, ...]]
) -> None:
    check_twin(count, eager, actions)


@settings(max_examples=40)
@example(1, True, [("fetch", 0, False)] * 4 + [("write", 0)])
@example(3, True, [("forward", [1, 2, 0]), ("forward", [0, 1, 2]), ("write", 0)])
@given(st.integers(1, len(INFOS)), st.booleans(), st.lists(ACTIONS | WRITES, max_size=14))
def test_the_same_with_writes_between(count: int, eager: bool, actions: list[tuple[Any, ...]]) -> None:
    check_twin(count, eager, actions)
