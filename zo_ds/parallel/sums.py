"""Sums of losses that come out the same, to the last bit, whoever added which of them in which order.

A loss is a multiple of 2**-64 in 128 bits: sums are integer sums, and so is what crosses between ranks, 16 bytes for
each place at which the loss was evaluated, however many examples a rank has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SCALE = 64
_BYTES = 16
_NOT_FINITE = -(1 << 127)
"""Stands for a sum with a nan or an infinity in it, or beyond 2**63."""
_LIMIT = 1 << 127


def exact_sums(losses: Tensor) -> list[int | None]:
    """The sum over examples of each place, in units of 2**-64; None where one is not finite or beyond 2**63.

    Args:
        losses: fp64 [places, examples]; bits of a loss below 2**-64 are cut off.
    """
    return [_sum(row) for row in losses.tolist()]


def _sum(values: Sequence[float]) -> int | None:
    if not all(math.isfinite(value) and abs(value) < 2.0**63 for value in values):
        return None
    total = sum(int(math.ldexp(value, _SCALE)) for value in values)
    return total if abs(total) < _LIMIT else None


def add(sums: Sequence[int | None]) -> int | None:
    """The sum of sums; None if one of them is not finite."""
    known = [value for value in sums if value is not None]
    total = sum(known)
    return total if len(known) == len(sums) and abs(total) < _LIMIT else None


def mean(total: int | None, count: int) -> float:
    """The correctly rounded mean of so many losses; nan if their sum is not finite."""
    return math.nan if total is None else total / (count << _SCALE)


def to_words(sums: Sequence[int | None]) -> Tensor:
    """int64 [2 * sums]: how sums cross between ranks."""
    raw = b"".join((_NOT_FINITE if s is None else s).to_bytes(_BYTES, "little", signed=True) for s in sums)
    return torch.frombuffer(bytearray(raw), dtype=torch.int64) if raw else torch.zeros(0, dtype=torch.int64)


def from_words(words: Tensor) -> list[int | None]:
    """The sums in a tensor of `to_words`."""
    raw = words.contiguous().numpy().tobytes()
    found = [int.from_bytes(raw[at : at + _BYTES], "little", signed=True) for at in range(0, len(raw), _BYTES)]
    return [None if value == _NOT_FINITE else value for value in found]
