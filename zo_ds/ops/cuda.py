"""The ops on CUDA tensors: kernels compiled for the card at first use, launched by the driver on torch's stream.

Never run yet: no GPU was at hand. The kernels are compiled for sm_80 and sm_90 and run on the host by the tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zo_ds.errors import MachineError
from zo_ds.maths.noise import normal_table
from zo_ds.ops import reference
from zo_ds.ops.builder import WITHOUT
from zo_ds.ops.cuda_builder import CUDAOpBuilder

THREADS = 128
TILE = 4096
RUN = 8
BLOCK_OF_DIRECTIONS = 4
"""As in zo_kernels.cuh."""
_HASH_BLOCKS = 1024
_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class _PerturbArguments(ctypes.Structure):
    _fields_ = (
        ("n", c_int64),
        ("start", c_uint64),
        ("seed", c_uint64),
        ("param", c_uint32),
        ("count", c_int32),
        ("directions", c_uint32 * BLOCK_OF_DIRECTIONS),
        ("minus_eps", c_float * BLOCK_OF_DIRECTIONS),
    )


class _PlanArguments(ctypes.Structure):
    _fields_ = (
        ("updates", c_int32),
        ("term_counts", c_void_p),
        ("shrinks", c_void_p),
        ("rounding_seeds", c_void_p),
        ("seeds", c_void_p),
        ("directions", c_void_p),
        ("coefficients", c_void_p),
    )


class _Kernels:
    """The kernels of one device."""

    def __init__(self, image: bytes) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = c_void_p()
        self._functions: dict[str, c_void_p] = {}
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), image), "cuModuleLoadData")

    def launch(self, name: str, threads: int, *arguments: Any) -> None:
        """Run a kernel on the current stream with at least so many threads."""
        if threads <= 0:
            return
        if name not in self._functions:
            function = c_void_p()
            status = self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
            self._check(status, f"cuModuleGetFunction({name})")
            self._functions[name] = function
        pointers = (c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        blocks = -(-threads // THREADS)
        status = self._driver.cuLaunchKernel(
            self._functions[name], blocks, 1, 1, THREADS, 1, 1, 0, stream, pointers, None
        )
        self._check(status, f"cuLaunchKernel({name})")

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise MachineError(f"{what} failed with code {status}", why=(text.value or b"").decode(), remedy=WITHOUT)


@cache
def _kernels(device: int) -> _Kernels | None:
    with torch.cuda.device(device):
        image = CUDAOpBuilder().load()
        return None if image is None else _Kernels(image)


def perturb_(
    out: Tensor,
    theta: Tensor,
    seed: int,
    param: int,
    directions: Sequence[int],
    eps: Sequence[float],
    start: int,
    columns: int,
    gaussian: bool,
) -> None:
    """See `zo_ds.ops.api.perturb`."""
    kernels = _kernels(theta.device.index)
    if kernels is None:
        reference.perturb_(out, theta, seed, param, directions, eps, start, columns, gaussian)
        return
    n, kinds = theta.numel(), f"{_SHORT[theta.dtype]}_{_SHORT[out.dtype]}"
    with torch.cuda.device(theta.device):
        for first, arguments in _blocks(n, start, seed, param, directions, eps):
            to = c_void_p(out.data_ptr() + first * n * out.element_size())
            fixed = (c_void_p(theta.data_ptr()), to, arguments)
            if columns:
                threads = _rows(n, start, columns) * -(-columns // RUN)
                kernels.launch(f"zo_perturb_factored_{kinds}", threads, *fixed, c_uint64(columns))
            elif gaussian:
                kernels.launch(f"zo_perturb_gaussian_{kinds}", _runs(n, start), *fixed, _quantiles(theta.device))
            else:
                most = 1 if arguments.count == 1 else BLOCK_OF_DIRECTIONS
                kernels.launch(f"zo_perturb{most}_{kinds}", 32 * _tiles(n, start), *fixed)


def embedding_rows_(
    out: Tensor,
    table: Tensor,
    ids: Tensor,
    seed: int,
    param: int,
    directions: Sequence[int],
    eps: Sequence[float],
    factored: bool,
    gaussian: bool,
) -> None:
    """See `zo_ds.ops.api.embedding_rows`."""
    kernels = _kernels(table.device.index)
    if kernels is None:
        reference.embedding_rows_(out, table, ids, seed, param, directions, eps, factored, gaussian)
        return
    rows, width, kinds = ids.numel(), table.shape[1], f"{_SHORT[table.dtype]}_{_SHORT[out.dtype]}"
    threads = rows * (width // RUN + 2)
    with torch.cuda.device(table.device):
        for first, arguments in _blocks(table.numel(), 0, seed, param, directions, eps):
            fixed = (
                c_void_p(table.data_ptr()),
                c_void_p(ids.data_ptr()),
                c_void_p(out.data_ptr() + first * rows * width * out.element_size()),
                c_int64(rows),
                c_int64(width),
            )
            if gaussian:
                kernels.launch(f"zo_embedding_gaussian_{kinds}", threads, *fixed, arguments, _quantiles(table.device))
            else:
                kernels.launch(f"zo_embedding_{kinds}", threads, *fixed, c_int32(factored), arguments)


def update_(
    thetas: Sequence[Tensor],
    params: Sequence[int],
    starts: Sequence[int],
    columns: Sequence[int],
    gaussian: Sequence[bool],
    decays: Sequence[bool],
    term_counts: Tensor,
    shrinks: Tensor,
    rounding_seeds: Tensor,
    seeds: Tensor,
    directions: Tensor,
    coefficients: Tensor,
) -> None:
    """See `zo_ds.ops.api.apply_`."""
    device = thetas[0].device
    kernels = _kernels(device.index)
    plan = (term_counts, shrinks, rounding_seeds, seeds, directions, coefficients)
    if kernels is None:
        reference.update_(thetas, params, starts, columns, gaussian, decays, *plan)
        return
    groups: dict[str, list[tuple[int, ...]]] = {}
    sizes: dict[str, int] = {}
    for theta, param, start, width, normal, decay in zip(
        thetas, params, starts, columns, gaussian, decays, strict=True
    ):
        n = theta.numel()
        if n == 0:
            continue
        if width:
            kind, workers = "factored_", _rows(n, start, width) * -(-width // RUN)
        else:
            kind, workers = ("gaussian_", _runs(n, start)) if normal else ("", _tiles(n, start))
        name = f"zo_update_{kind}{_SHORT[theta.dtype]}"
        first = sizes.get(name, 0)
        groups.setdefault(name, []).append((theta.data_ptr(), n, start, width, param, int(decay), first))
        sizes[name] = first + workers
    with torch.cuda.device(device):
        held = [tensor.to(device) for tensor in plan]
        arguments = _PlanArguments(term_counts.numel(), *[tensor.data_ptr() for tensor in held])
        for name, rows in groups.items():
            table = torch.tensor(rows, dtype=torch.int64).to(device)
            fixed = (c_void_p(table.data_ptr()), c_int32(len(rows)), arguments)
            if "gaussian" in name:
                kernels.launch(name, sizes[name], *fixed, _quantiles(device))
            else:
                kernels.launch(name, sizes[name] * (1 if "factored" in name else 32), *fixed)


def signs_(out: Tensor, seed: int, param: int, directions: Sequence[int], start: int, count: int, stream: int) -> None:
    """See `zo_ds.ops.api.signs`."""
    kernels = _kernels(out.device.index)
    if kernels is None:
        reference.signs_(out, seed, param, directions, start, count, stream)
        return
    width = out.shape[1]
    with torch.cuda.device(out.device):
        for first, arguments in _blocks(count, start, seed, param, directions, [0.0] * len(directions)):
            to = c_void_p(out.data_ptr() + first * width)
            kernels.launch("zo_signs", width, to, c_int64(width), c_uint64(start), c_uint32(stream), arguments)


def state_hash(theta: Tensor, param: int, start: int) -> Tensor:
    """See `zo_ds.ops.api.state_hash`."""
    kernels = _kernels(theta.device.index)
    if kernels is None:
        return reference.state_hash(theta, param, start)
    with torch.cuda.device(theta.device):
        total = torch.zeros((), dtype=torch.int64, device=theta.device)
        kernels.launch(
            "zo_hash_f32" if theta.dtype == torch.float32 else "zo_hash_half",
            min(32 * _tiles(theta.numel(), start), _HASH_BLOCKS * THREADS),
            c_void_p(theta.data_ptr()),
            c_int64(theta.numel()),
            c_uint64(start),
            c_uint32(param),
            c_void_p(total.data_ptr()),
        )
        return total


def _blocks(
    n: int, start: int, seed: int, param: int, directions: Sequence[int], eps: Sequence[float]
) -> Iterator[tuple[int, _PerturbArguments]]:
    """Directions in blocks of what one launch takes: (number of the block's first, its arguments)."""
    for first in range(0, len(directions), BLOCK_OF_DIRECTIONS):
        numbers = directions[first : first + BLOCK_OF_DIRECTIONS]
        radii = [-radius for radius in eps[first : first + BLOCK_OF_DIRECTIONS]]
        arguments = _PerturbArguments(n, start, seed & 0xFFFFFFFFFFFFFFFF, param, len(numbers))
        arguments.directions[: len(numbers)] = numbers
        arguments.minus_eps[: len(numbers)] = radii
        yield first, arguments


def _tiles(n: int, start: int) -> int:
    return -(-(start + n) // TILE) - start // TILE if n else 0


def _runs(n: int, start: int) -> int:
    return -(-(start + n) // RUN) - start // RUN if n else 0


def _quantiles(device: torch.device) -> c_void_p:
    """Address of the positive quantiles on a device, which stay where they are."""
    return c_void_p(normal_table(device).data_ptr())


def _rows(n: int, start: int, columns: int) -> int:
    return -(-(start + n) // columns) - start // columns if n else 0
