"""The CUDA kernels and their launcher without a GPU: compiled for the host, one thread after the other, same bits.

`tests/cuda_on_host/shim.cpp` holds the kernels and stands in for the CUDA driver; everything of `zo_ds.ops.cuda` runs.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ops import (
    Case,
    embedding_rows_case,
    perturb_case,
    same,
    signs_case,
    state_hash_case,
    update_case,
    updating,
)
from torch import Tensor

from zo_ds.errors import MachineError
from zo_ds.ops import cuda, reference
from zo_ds.ops.sources import FLAGS, SOURCES, compiler

SHIM = Path(__file__).parents[1] / "cuda_on_host" / "shim.cpp"
CHECKS = ["-fsanitize=alignment,shift,bounds,signed-integer-overflow", "-Wall", "-Werror=unused-function"]
COMPILER = compiler()
LIBC = ctypes.CDLL(None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels on the host. -O1 compiles ten times faster than -O3 and runs fast enough."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    objects, library = folder / "shim.o", folder / "shim.so"
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-shared")]
    for arguments in (
        [*flags, "-O1", *CHECKS, "-Wno-unknown-pragmas", "-I", str(SOURCES), "-c", str(SHIM), "-o", str(objects)],
        ["-shared", str(objects), "-o", str(library)],
    ):
        result = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def kernels(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> cuda._Kernels:
    """The ops of `zo_ds.ops.cuda` take CPU tensors and launch on the host."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
        kernels = cuda._Kernels(b"")
    monkeypatch.setattr(cuda, "_kernels", lambda device: kernels)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return kernels


class Guarded:
    """Calls the ops of `cuda` with tensors that end where memory ends, or begin where it begins."""

    def __init__(self, *, at_end: bool) -> None:
        self._at_end = at_end

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            pairs = []

            def moved(value: Any) -> Any:
                if isinstance(value, list | tuple):
                    return [moved(part) for part in value]
                if not isinstance(value, Tensor) or value.numel() == 0:
                    return value
                pairs.append((value, self._copy(value)))
                return pairs[-1][1]

            result = getattr(cuda, name)(*map(moved, arguments))
            for value, copy in pairs:
                value.copy_(copy)
            return result

        return call

    def _copy(self, value: Tensor) -> Tensor:
        length = value.numel() * value.element_size()
        region = mmap(-1, -(-length // PAGESIZE) * PAGESIZE + 2 * PAGESIZE)
        at = len(region) - PAGESIZE - length if self._at_end else PAGESIZE
        copy = torch.frombuffer(region, dtype=value.dtype, count=value.numel(), offset=at).view(value.shape)
        copy.copy_(value)
        for page in (copy.data_ptr() - at, copy.data_ptr() - at + len(region) - PAGESIZE):
            assert LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGESIZE), 0) == 0
        return copy


def many_tensors_case(rng: random.Random, _: bool) -> Case:
    """An update of dozens of slices, which fall into up to nine launches; some slices are empty."""
    sizes = [rng.choice([0, 1, rng.randrange(200), rng.randrange(5000), 4096]) for _ in range(rng.randrange(20, 50))]
    return updating(rng, sizes, rng.choice([1, 1, 2]))


MAKERS: list[Callable[[random.Random, bool], Case]] = [
    perturb_case, embedding_rows_case, update_case, signs_case, state_hash_case, many_tensors_case
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "cases", "entry_points"),
    zip(MAKERS, (700, 300, 200, 150, 150, 10), (20, 10, 9, 1, 2, 9), strict=True),
    ids=[make.__name__ for make in MAKERS],
)
def test_random_cases_have_the_bits_of_the_reference(
    make: Callable[[random.Random, bool], Case], cases: int, entry_points: int, kernels: cuda._Kernels
) -> None:
    for number in range(cases):
        case = make(random.Random(7_000_000 + number), number < 2)
        module: Any = (cuda, Guarded(at_end=True), Guarded(at_end=False))[number % 3]
        assert all(map(same, case(module), case(reference))), f"case {number}"
    assert len(kernels._functions) == entry_points


def test_the_hash_goes_round_a_grid_smaller_than_the_slice(kernels: cuda._Kernels) -> None:
    tiles = cuda._HASH_BLOCKS * cuda.THREADS // 32 + 3
    theta = torch.arange(tiles * cuda.TILE, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert int(cuda.state_hash(theta, 5, 100)) == int(reference.state_hash(theta, 5, 100))
    assert list(kernels._functions) == ["zo_hash_half"]


@pytest.mark.parametrize("make", MAKERS[:5], ids=lambda make: make.__name__)
def test_without_kernels_the_reference_runs(
    make: Callable[[random.Random, bool], Case], kernels: cuda._Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_kernels", lambda device: None)
    for number in range(3):
        case = make(random.Random(number), False)
        assert all(map(same, case(cuda), case(reference)))
    assert not kernels._functions


def test_a_launch_that_fails_is_an_error(kernels: cuda._Kernels) -> None:
    with pytest.raises(MachineError, match=r"cuModuleGetFunction\(zo_nothing\) failed with code 500"):
        kernels.launch("zo_nothing", 1)
    theta, total = torch.zeros(4), torch.zeros((), dtype=torch.int64)

    def hash_from(address: int, count: int) -> None:
        rest = (ctypes.c_int64(count), ctypes.c_uint64(0), ctypes.c_uint32(1), ctypes.c_void_p(total.data_ptr()))
        kernels.launch("zo_hash_f32", 32, ctypes.c_void_p(address), *rest)

    hash_from(theta.data_ptr() + 4, 3)
    for address in (theta.data_ptr() + 1, 0):
        with pytest.raises(MachineError, match=r"cuLaunchKernel\(zo_hash_f32\) failed with code 719"):
            hash_from(address, 3)
