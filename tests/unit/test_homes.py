"""Where shards live: files without names, memory that processes share, slices of it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_ds.errors import ConfigError, MachineError
from zo_ds.stores.homes import Room, aligned, map_file, nameless_file, pinned

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
OTHER = """
import sys, torch
from zo_ds.stores.homes import map_file
process, size, *handles = map(int, sys.argv[1:])
for handle in handles:
    memory = map_file(process, handle, size)
    memory[4:8] = torch.tensor([9, 8, 7, 6], dtype=torch.uint8)
    print(memory[:4].tolist(), flush=True)
    sys.stdin.readline()
    print(memory[8:12].tolist(), flush=True)
"""


def open_files() -> set[str]:
    return {handle for handle in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{handle}").exists()}


def test_two_processes_share_the_bytes_of_a_file_that_is_nowhere(tmp_path: Path) -> None:
    size = 100_001
    with nameless_file(tmp_path / "folder", size) as on_disk, nameless_file(None, size) as in_memory:
        assert list((tmp_path / "folder").iterdir()) == []
        command = [sys.executable, "-c", OTHER, *map(str, (os.getpid(), size, on_disk, in_memory))]
        memories = [map_file(os.getpid(), handle, size) for handle in (on_disk, in_memory)]
        for memory in memories:
            assert (memory.numel(), memory.dtype, int(memory.count_nonzero())) == (size, torch.uint8, 0)
            memory[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdin is not None
        for memory in memories:
            assert other.stdout.readline() == "[1, 2, 3, 4]\n"
            assert memory[4:8].tolist() == [9, 8, 7, 6]
            memory[8:12] = torch.tensor([5, 5, 6, 6], dtype=torch.uint8)
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "[5, 5, 6, 6]\n"
    assert other.wait(60) == 0
    # Closed everywhere, they go on for all that have mapped them.
    assert all(memory[4:12].tolist() == [9, 8, 7, 6, 5, 5, 6, 6] for memory in memories)


@pytest.mark.parametrize("fail", [False, True])
def test_a_file_is_closed_however_its_use_ends(fail: bool, tmp_path: Path) -> None:
    before = open_files()
    for folder in (tmp_path, None):
        try:
            with nameless_file(folder, 10) as handle:
                assert open_files() - before == {str(handle)}
                os.pwrite(handle, b"x", 9)
                if fail:
                    raise KeyError
        except KeyError:
            assert fail
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 4096])
@pytest.mark.parametrize("on_disk", [True, False])
def test_sizes_at_the_edges(on_disk: bool, size: int, tmp_path: Path) -> None:
    with nameless_file(tmp_path if on_disk else None, size) as handle:
        assert os.fstat(handle).st_size == max(1, size)
        assert map_file(os.getpid(), handle, size).numel() == max(1, size)


def test_every_byte_has_its_place_on_the_disk(tmp_path: Path) -> None:
    with nameless_file(tmp_path, 10 * 2**20) as handle:
        assert os.fstat(handle).st_blocks * 512 >= 10 * 2**20


def test_memory_that_is_shared_is_not_limited_by_what_is_mounted() -> None:
    """`/dev/shm` is 64 MiB in a container; a memfd is no file of it."""
    free = os.statvfs("/dev/shm")
    with nameless_file(None, 2**20) as handle:
        here, shm = os.fstat(handle), os.stat("/dev/shm")
        assert here.st_dev != shm.st_dev
        assert os.readlink(f"/proc/self/fd/{handle}").startswith("/memfd:")
        map_file(os.getpid(), handle, 2**20).fill_(3)
        after = os.statvfs("/dev/shm")
    assert free.f_bfree - after.f_bfree < 2**20 // free.f_bsize or free.f_bfree == after.f_bfree


def test_no_room_for_a_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = open_files()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MachineError) as caught, nameless_file(tmp_path, 2**20):
            raise AssertionError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.what.startswith("cannot keep 0.00 GiB of weights there: File too large")
    assert "nvme_path" in caught.value.where
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="does not exist"), nameless_file(tmp_path / "no" / "folder", 1):
        pass
    with pytest.raises(MachineError, match="File exists"), nameless_file(tmp_path / "file", 1):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("where", [lambda: (2**22 - 1, 0), lambda: (os.getpid(), 10_000)], ids=["process", "file"])
def test_a_file_that_is_not_there_cannot_be_mapped(where: Callable[[], tuple[int, int]]) -> None:
    process, handle = where()
    with pytest.raises(MachineError) as caught:
        map_file(process, handle, 64)
    assert caught.value.where == f"/proc/{process}/fd/{handle}"
    assert "layout=solo" in caught.value.remedy


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(DTYPES)), max_size=20))
def test_a_room_hands_out_what_does_not_overlap(wanted: list[tuple[int, torch.dtype]]) -> None:
    memory = pinned(sum(aligned(count * dtype.itemsize) for count, dtype in wanted))
    memory.zero_()
    room, taken = Room(memory), list[torch.Tensor]()
    for number, (count, dtype) in enumerate(wanted):
        taken.append(room.take(count, dtype))
        assert (taken[-1].shape, taken[-1].dtype) == ((count,), dtype)
        assert not count or (taken[-1].data_ptr() - memory.data_ptr()) % 64 == 0
        taken[-1].view(torch.uint8).fill_(number + 1)
    for number, part in enumerate(taken):
        assert bool((part.view(torch.uint8) == number + 1).all())
    assert int(memory.count_nonzero()) == sum(part.nbytes for part in taken)


def test_a_room_does_not_grow() -> None:
    room = Room(torch.zeros(128, dtype=torch.uint8))
    room.take(1, torch.float32)
    room.take(16, torch.float32)
    with pytest.raises(RuntimeError):
        room.take(1, torch.float32)


@given(st.integers(0, 10**12))
def test_aligned(size: int) -> None:
    assert 0 <= aligned(size) - size < 64
    assert aligned(size) % 64 == 0
