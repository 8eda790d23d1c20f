"""Noise, version 1: every element is a pure function of (run seed, step, direction, parameter, its index).

Philox4x32-10 (Salmon et al., SC 2011) in counter mode. One 128-bit block holds the signs of 128 elements of a tile
of 4096: element ``j`` of the whole, unsharded parameter takes bit ``((j >> 8) & 15) * 8 + (j & 7)`` of block
``(j >> 12) * 32 + ((j >> 3) & 31)``, and a set bit means -1. So byte ``(j >> 8) & 15`` of a block holds the signs of
eight neighbours, and the functions here work on bytes. Any slice can be produced alone, on any device, with the same
result; nothing is stored and no generator state exists.

Standard normals and rounding take 16 bits an element, 8 elements to a block: element ``j`` takes half-word ``j & 7``
(low half of word 0 first) of block ``j >> 3``. A normal is the entry of `normal_table` that its half-word names, so no
device computes a logarithm or a square root.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

NOISE_VERSION = 1
TILE = 4096
"""Elements whose signs share 32 consecutive Philox blocks."""
QUANTILES = 1 << 15
"""Different magnitudes of a normal."""

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """What a block of noise is for; the top byte of counter word 1."""

    DENSE = 0
    LEFT = 1
    RIGHT = 2
    ROUNDING = 3
    GAUSSIAN = 4


def splitmix64(x: int) -> int:
    """One output of splitmix64 (Steele et al., 2014) for state ``x``, modulo 2**64."""
    z = (x + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def step_seed(run_seed: int, step: int) -> int:
    """The 64-bit Philox key of a step: ``splitmix64(splitmix64(run_seed) + step)``, modulo 2**64."""
    return splitmix64((splitmix64(run_seed & _MASK64) + step) & _MASK64)


def param_id(name: str) -> int:
    """First four bytes, little-endian, of the SHA-256 of the parameter's canonical name in the base model."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of broadcastable counter words.

    Args:
        c0: counter word 0, like the others an int64 tensor with values in [0, 2**32).
        c1: counter word 1.
        c2: counter word 2.
        c3: counter word 3.
        seed: 64-bit key.

    Returns:
        The four output words as int64 tensors with values in [0, 2**32).
    """
    shape = (c0 | c1 | c2 | c3).shape
    x0, x1, x2, x3 = (word.expand(shape).clone(memory_format=torch.contiguous_format) for word in (c0, c1, c2, c3))
    p0, p1 = torch.empty_like(x0), torch.empty_like(x0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    # int64 products wrap modulo 2**64, and the mask after the shift drops the sign extension.
    for _ in range(10):
        torch.mul(x0, _PHILOX_M0, out=p0)
        torch.mul(x2, _PHILOX_M1, out=p1)
        torch.bitwise_right_shift(p1, 32, out=x0)
        x0.bitwise_and_(_MASK32).bitwise_xor_(x1).bitwise_xor_(k0)
        torch.bitwise_right_shift(p0, 32, out=x2)
        x2.bitwise_and_(_MASK32).bitwise_xor_(x3).bitwise_xor_(k1)
        torch.bitwise_and(p1, _MASK32, out=x1)
        torch.bitwise_and(p0, _MASK32, out=x3)
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return x0, x1, x2, x3


def _blocks(
    seed: int, param: int, directions: Sequence[int], stream: Stream, first: int, count: int, device: torch.device
) -> Tensor:
    """Words of blocks ``first .. first + count - 1`` for each direction, int64 [directions, count, 4]."""
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    high = ((index >> 32) & 0xFFFFFF) | (int(stream) << 24)
    direction = torch.tensor(directions, dtype=torch.int64, device=device).unsqueeze(1)
    words = philox4x32(index & _MASK32, high, torch.full_like(index[:1], param), direction, seed)
    return torch.stack(words, dim=-1)


def sign_bytes(
    seed: int,
    param: int,
    directions: Sequence[int],
    first_tile: int,
    tiles: int,
    *,
    stream: Stream = Stream.DENSE,
    device: torch.device | None = None,
) -> Tensor:
    """Signs of whole tiles, eight to a byte, in element order.

    Args:
        seed: step seed, see `step_seed`.
        param: parameter id, see `param_id`.
        directions: direction numbers, N of them.
        first_tile: index of the first tile; element ``first_tile * TILE`` comes first.
        tiles: how many tiles.
        stream: which of the independent streams.
        device: where the result is wanted, the CPU if None.

    Returns:
        int32 [N, tiles * 512] with values 0..255; bit b of byte k is the sign of element ``8 * k + b``, 1 meaning -1.
    """
    words = _blocks(seed, param, directions, stream, first_tile * 32, tiles * 32, device or torch.device("cpu"))
    # A little-endian word seen as bytes has its lowest bits first, which is the order of the definition.
    octets = words.to(torch.int32).view(torch.uint8).view(len(directions), tiles, 32, 16)
    return octets.transpose(2, 3).to(torch.int32).reshape(len(directions), -1)


def sign_table(device: torch.device | None = None) -> Tensor:
    """fp32 [256, 8]: the eight signs that a byte of noise stands for."""
    byte = torch.arange(256, dtype=torch.int32, device=device).unsqueeze(1)
    bit = torch.arange(8, dtype=torch.int32, device=device)
    return 1.0 - 2.0 * (byte.bitwise_right_shift(bit) & 1).float()


def signs(
    seed: int,
    param: int,
    direction: int,
    start: int,
    count: int,
    *,
    stream: Stream = Stream.DENSE,
    device: torch.device | None = None,
) -> Tensor:
    """Signs of elements ``start .. start + count - 1`` of one direction, fp32 [count] of +1 and -1."""
    first = start // TILE
    tiles = -(-(start + count) // TILE) - first
    packed = sign_bytes(seed, param, [direction], first, tiles, stream=stream, device=device)
    return sign_table(device).index_select(0, packed[0]).view(-1).narrow(0, start - first * TILE, count)


def half_words(
    seed: int,
    param: int,
    direction: int,
    start: int,
    count: int,
    *,
    stream: Stream,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform 16-bit integers of elements ``start .. start + count - 1``, int32 [count] with values 0..65535."""
    first = start >> 3
    blocks = ((start + count + 7) >> 3) - first
    words = _blocks(seed, param, [direction], stream, first, blocks, device or torch.device("cpu"))[0]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).to(torch.int32)
    return halves.view(-1).narrow(0, start - (first << 3), count)


def rounding_bits(seed: int, param: int, start: int, count: int, *, device: torch.device | None = None) -> Tensor:
    """Uniform 16-bit integers for stochastic rounding, see `half_words`: stream 3, direction 0."""
    return half_words(seed, param, 0, start, count, stream=Stream.ROUNDING, device=device)


@cache
def normal_table(device: torch.device | None = None) -> Tensor:
    """fp32 [65536]: the standard normal that a half-word stands for; the top bit is its sign, the others a quantile.

    Entry i of the first half is ``s q((i + 1/2) / 2**15)``, q being the quantile function of |z|; the second half is
    minus the first. s = 1.0000101408279616 makes the variance 1, up to rounding to fp32: it is
    0.99999999942893113168, the mean is 0, and the largest |z| is 4.324963092803955 (fourth moment 2.99925).

    The bits do not depend on the machine: fp64 values are rounded to fp32, and the nearest of them to a rounding
    boundary is more than 5000 fp64 units away, where libraries differ in the last one or two. The tests hold both.
    """
    if device is not None and device.type != "cpu":
        return normal_table().to(device)
    quantile = NormalDist().inv_cdf
    half = [quantile(0.5 + (i + 0.5) / (2 * QUANTILES)) for i in range(QUANTILES)]
    scale = math.sqrt(QUANTILES / math.fsum(z * z for z in half))
    positive = torch.tensor([z * scale for z in half], dtype=torch.float64, device="cpu").float()
    return torch.cat((positive, -positive))


def normals(
    seed: int, param: int, direction: int, start: int, count: int, *, device: torch.device | None = None
) -> Tensor:
    """Standard normals of elements ``start .. start + count - 1`` of one direction, fp32 [count]."""
    words = half_words(seed, param, direction, start, count, stream=Stream.GAUSSIAN, device=device)
    return normal_table(device).index_select(0, words)
