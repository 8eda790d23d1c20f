"""Numbers in an order that looks random, and is a pure function of a salt."""

from __future__ import annotations

from collections.abc import Iterable

from zo_ds.maths.noise import splitmix64


def salted(seed: int, *streams: int) -> int:
    """A salt from a seed and what else tells one use from another; 64 bits.

    Args:
        seed: any integer.
        streams: 0 .. 2**64 - 1.
    """
    salt = splitmix64(seed % 2**64)
    for stream in streams:
        salt = splitmix64(salt ^ stream)
    return salt


def shuffled(numbers: Iterable[int], salt: int) -> list[int]:
    """Numbers from 0 to 2**64 - 1 in the order of their salted hashes."""
    return sorted(numbers, key=lambda number: splitmix64(salt ^ number))
