"""The ops on CPU tensors: raw pointers into the compiled library, or the torch reference where there is none."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch  # before the library is loaded, so that both share one OpenMP pool
from torch import Tensor

from zo_ds.maths.noise import normal_table
from zo_ds.ops import reference
from zo_ds.ops.builder import CPUOpBuilder, instruction_set
from zo_ds.ops.plan import signed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def _library() -> ctypes.CDLL | None:
    library = CPUOpBuilder().load()
    if library is not None:
        pointer, number = c_void_p, c_int64
        how = [c_int, c_int]
        terms = [number, pointer, pointer]
        types: dict[str, list[Any]] = {
            "perturb": [pointer, c_int, pointer, c_int, number, c_uint64, c_uint64, pointer, c_uint32, *terms, pointer],
            "embedding_rows": [
                pointer,
                c_int,
                pointer,
                number,
                pointer,
                c_int,
                number,
                c_int,
                pointer,
                c_uint32,
                *terms,
                pointer,
            ],
            "update": [number, *[pointer] * 9, number, *[pointer] * 6],
            "signs": [pointer, number, c_uint64, c_uint32, c_uint32, *terms],
            "hash": [pointer, c_int, number, c_uint64, c_uint32],
        }
        for name, arguments in types.items():
            function = library[f"zo_cpu_{name}"]
            function.argtypes = [*arguments, *how]
            function.restype = c_uint64 if name == "hash" else None
            setattr(library, f"zo_cpu_{name}", function)
    return library


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
    library = _library()
    if library is None:
        reference.perturb_(out, theta, seed, param, directions, eps, start, columns, gaussian)
        return
    terms = _Terms(seed, directions, eps)
    library.zo_cpu_perturb(
        theta.data_ptr(), DTYPES[theta.dtype], out.data_ptr(), DTYPES[out.dtype], theta.numel(), start, columns,
        _quantiles(gaussian), param, *terms.pointers(), *_how(),
    )  # fmt: skip


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
    library = _library()
    if library is None:
        reference.embedding_rows_(out, table, ids, seed, param, directions, eps, factored, gaussian)
        return
    terms = _Terms(seed, directions, eps)
    library.zo_cpu_embedding_rows(
        table.data_ptr(), DTYPES[table.dtype], ids.data_ptr(), ids.numel(), out.data_ptr(), DTYPES[out.dtype],
        table.shape[1], int(factored), _quantiles(gaussian), param, *terms.pointers(), *_how(),
    )  # fmt: skip


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
    library = _library()
    plan = (term_counts, shrinks, rounding_seeds, seeds, directions, coefficients)
    if library is None:
        reference.update_(thetas, params, starts, columns, gaussian, decays, *plan)
        return
    count = len(thetas)
    library.zo_cpu_update(
        count,
        (c_void_p * count)(*[theta.data_ptr() for theta in thetas]),
        (c_int * count)(*[DTYPES[theta.dtype] for theta in thetas]),
        (c_int64 * count)(*[theta.numel() for theta in thetas]),
        (c_int64 * count)(*starts),
        (c_int64 * count)(*columns),
        (c_int * count)(*gaussian),
        _quantiles(any(gaussian)),
        (c_int64 * count)(*params),
        (c_int * count)(*decays),
        term_counts.numel(),
        *[tensor.data_ptr() for tensor in plan],
        *_how(),
    )


def signs_(out: Tensor, seed: int, param: int, directions: Sequence[int], start: int, count: int, stream: int) -> None:
    """See `zo_ds.ops.api.signs`."""
    library = _library()
    if library is None:
        reference.signs_(out, seed, param, directions, start, count, stream)
        return
    seeds, numbers, _ = (terms := _Terms(seed, directions, ())).pointers()[1:]
    library.zo_cpu_signs(out.data_ptr(), count, start, stream, param, terms.count, seeds, numbers, *_how())


def state_hash(theta: Tensor, param: int, start: int) -> Tensor:
    """See `zo_ds.ops.api.state_hash`."""
    library = _library()
    if library is None:
        return reference.state_hash(theta, param, start)
    value = library.zo_cpu_hash(theta.data_ptr(), DTYPES[theta.dtype], theta.numel(), start, param, *_how())
    return torch.tensor(signed(value), dtype=torch.int64)


class _Terms:
    """Directions of one step as C arrays, which live as long as this object."""

    def __init__(self, seed: int, directions: Sequence[int], eps: Sequence[float]) -> None:
        self.count = len(directions)
        self._seeds = (c_int64 * self.count)(*[seed] * self.count)
        self._directions = (c_int64 * self.count)(*directions)
        # The library subtracts c u.
        self._coefficients = (ctypes.c_float * self.count)(*[-value for value in eps])

    def pointers(self) -> tuple[object, ...]:
        return self.count, self._seeds, self._directions, self._coefficients


def _quantiles(gaussian: bool) -> int | None:
    """Address of the positive quantiles, which stay where they are; None where directions are signs."""
    return normal_table().data_ptr() if gaussian else None


def _how() -> tuple[int, int]:
    return instruction_set(), torch.get_num_threads()
