"""Noise version 1 and update version 1 in plain Python integers and fractions: slow, and written from the contract."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

M32, M64 = 2**32 - 1, 2**64 - 1
DENSE, LEFT, RIGHT, ROUNDING, GAUSSIAN = 0, 1, 2, 3, 4
FORMATS = {"bfloat16": (8, -126, 127), "float16": (11, -14, 15)}
"""Significant bits, exponent of the smallest normal number, exponent of the largest."""

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second & M32, (first >> 32) ^ d ^ m, first & M32
        k, m = (k + 0x9E3779B9) & M32, (m + 0xBB67AE85) & M32
    return a, b, c, d


def splitmix64(state: int) -> int:
    """One output."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def step_seed(run_seed: int, step: int) -> int:
    """Key of a step."""
    return splitmix64((splitmix64(run_seed % 2**64) + step) % 2**64)


def param_id(name: str) -> int:
    """Third counter word."""
    first = hashlib.sha256(name.encode("utf-8")).digest()[:4]
    return sum(byte << 8 * place for place, byte in enumerate(first))


@lru_cache(maxsize=1 << 16)
def block(seed: int, param: int, direction: int, stream: int, index: int) -> int:
    """128 random bits as one integer, word 0 lowest."""
    words = philox((index & M32, (index >> 32) + (stream << 24), param, direction), (seed & M32, seed >> 32))
    return sum(word << 32 * i for i, word in enumerate(words))


def tile_sign(seed: int, param: int, direction: int, stream: int, j: int) -> int:
    """Sign of element j of a stream."""
    bits = block(seed, param, direction, stream, (j >> 12) * 32 + ((j >> 3) & 31))
    return -1 if bits >> (((j >> 8) & 15) * 8 + (j & 7)) & 1 else 1


@lru_cache(maxsize=1)
def quantiles() -> list[float]:
    """The 2**15 positive normals: |z| = x with probability (i + 1/2) / 2**15, by Newton's method, scaled, as fp32."""
    roots, count, x = [], 1 << 15, 0.0
    for i in range(count):
        below, above = (2 * i + 1) / (2 * count), (2 * (count - i) - 1) / (2 * count)
        for _ in range(6):
            # Of the two, the one that is not near 1 has the digits.
            miss = math.erf(x / math.sqrt(2)) - below if below < above else above - math.erfc(x / math.sqrt(2))
            x -= miss * math.sqrt(math.pi / 2) * math.exp(x * x / 2)
        roots.append(x)
    scale = math.sqrt(count / math.fsum(x * x for x in roots))
    return [fp32(x * scale) for x in roots]


def normal(seed: int, param: int, direction: int, j: int) -> float:
    """Standard normal of element j: half-word j & 7 of block j >> 3 names a quantile and a sign."""
    word = block(seed, param, direction, GAUSSIAN, j >> 3) >> 16 * (j & 7) & 0xFFFF
    return -quantiles()[word - 0x8000] if word >= 0x8000 else quantiles()[word]


def element(seed: int, name: str, shape: Sequence[int], direction: int, j: int, structure: str) -> float:
    """Element j of a whole parameter in a direction that is dense, factored or gaussian."""
    param = param_id(name)
    if structure == "gaussian":
        return normal(seed, param, direction, j)
    if structure == "dense" or len(shape) < 2:
        return tile_sign(seed, param, direction, DENSE, j)
    row, column = divmod(j, math.prod(shape[1:]))
    return tile_sign(seed, param, direction, LEFT, row) * tile_sign(seed, param, direction, RIGHT, column)


def rounding_bits(seed: int, param: int, j: int) -> int:
    """Sixteen bits for element j: half-word j & 7 of block j >> 3."""
    return block(seed, param, 0, ROUNDING, j >> 3) >> 16 * (j & 7) & 0xFFFF


def fp32(value: float) -> float:
    """Nearest fp32 number, ties to even; sums and products of two fp32 numbers go through a double unharmed."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _split(value: float, dtype: str) -> tuple[Fraction, Fraction]:
    """|value| in units of its last place in the format, and that unit."""
    digits, smallest, _ = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, smallest)
    unit = Fraction(2) ** (exponent - digits + 1)
    return abs(Fraction(value)) / unit, unit


def _join(units: int, unit: Fraction, value: float, dtype: str) -> float:
    overflow = units * unit >= Fraction(2) ** (FORMATS[dtype][2] + 1)
    return math.copysign(math.inf if overflow else float(units * unit), value)


def nearest(value: float, dtype: str) -> float:
    """Nearest number of the format, ties to even."""
    if dtype == "float32" or not math.isfinite(value):
        return fp32(value)
    units, unit = _split(value, dtype)
    return _join(round(units), unit, value, dtype)


def stochastic(value: float, dtype: str, bits: int) -> float:
    """Away from zero iff floor(fraction * 65536) + bits reaches 65536, else towards zero."""
    if not math.isfinite(value):
        return value
    units, unit = _split(value, dtype)
    whole = math.floor(units)
    up = math.floor((units - whole) * 65536) + bits >= 65536
    return _join(whole + up, unit, value, dtype)


def perturbed(theta: float, dtype: str, eps: float, u: float) -> float:
    """theta + eps u of one element: an fp32 product, an fp32 sum, one rounding to nearest."""
    return nearest(fp32(theta + fp32(fp32(eps) * u)), dtype)


def updated(
    theta: float, dtype: str, terms: Sequence[tuple[float, float]], decay: float, bits: int, *, is_matrix: bool
) -> float:
    """One element after an update: terms are (coefficient, u) in order, decay is for matrices."""
    total = fp32(theta * fp32(1.0 - decay)) if is_matrix else theta
    for coefficient, u in terms:
        total = fp32(total - fp32(fp32(coefficient) * u))
    return total if dtype == "float32" else stochastic(total, dtype, bits)


def lowbias32(x: int) -> int:
    """The 32-bit mixer of C. Wellons."""
    x = (x ^ x >> 16) * 0x7FEB352D & M32
    x = (x ^ x >> 15) * 0x846CA68B & M32
    return x ^ x >> 16


def state_hash(patterns: Sequence[int], param: int, start: int) -> int:
    """Hash version 1 of elements start, start + 1, ... with these bit patterns: sum of products, modulo 2**64."""
    total = 0
    for j, pattern in enumerate(patterns, start):
        place = lowbias32((j % 4096 + 0x9E3779B9) & M32) | 1
        total += pattern * place * (splitmix64((splitmix64(param) + j // 4096) & M64) | 1)
    return total & M64
