"""Statistics of packed signs, see test_statistics.py: each a number that stays below 1 for perfect noise.

It is the largest of M z-scores over its bound: the quantile that perfect noise passes with probability 1 - 1e-6,
two-sided, 1e-6 / M for each score. `excess` holds the sum of their squares, chi-square with M degrees of freedom, to
the same, for too even is as wrong as too uneven. Chi-squares become z-scores by Wilson and Hilferty's cube root.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Statistic = Callable[[Array], float]
LONG = 1 << 24
LAGS = [*range(1, 130), 256, 512, 1024, 2048, 4096, 8192, 131072]
BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int64)


def unpacked(octets: Array) -> Array:
    """float32 of +1 and -1."""
    return np.float32(1) - np.float32(2) * np.unpackbits(octets, axis=-1, bitorder="little").astype(np.float32)


def in_blocks(octets: Array) -> Array:
    """The 16 bytes of each Philox block: [..., tile, lane, byte]."""
    return octets.reshape(*octets.shape[:-1], -1, 16, 32).swapaxes(-1, -2)


def half_word_signs(octets: Array) -> Array:
    """The top bits of the half-words of each block, in the order in which stochastic rounding uses these of its own."""
    return np.float32(1) - np.float32(2) * (in_blocks(octets)[..., 1::2] >> 7).ravel()


def quantile(comparisons: int) -> float:
    return -NormalDist().inv_cdf(1e-6 / 2 / comparisons)


def cube_root_score(chi_square: float, freedom: int) -> float:
    return (math.pow(chi_square / freedom, 1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


def chi_score(observed: Array, expected: Array | float) -> float:
    return cube_root_score(float(((observed - expected) ** 2 / expected).sum()), observed.size - 1)


def peak(scores: npt.ArrayLike) -> float:
    return float(np.abs(scores).max()) / quantile(np.size(scores))


def excess(scores: npt.ArrayLike) -> float:
    squares = float(np.square(np.asarray(scores, dtype=np.float64)).sum())
    return max(peak(scores), abs(cube_root_score(squares, np.size(scores))) / quantile(1))


def bias(octets: Array) -> float:
    """Of each 2**24 signs."""
    ones = [BITS_OF_BYTE.sum(1) @ np.bincount(run, minlength=256) for run in octets.reshape(-1, LONG // 8)]
    return excess((LONG - 2 * np.array(ones)) / math.sqrt(LONG))


def counts_by_place(octets: Array) -> Array:
    """How often each value occurs in each byte of a block: [16, 256]."""
    return np.stack([np.bincount(in_blocks(octets)[..., place].ravel(), minlength=256) for place in range(16)])


def bits_of_block(octets: Array) -> float:
    """Balance of each of its 128 bits."""
    blocks = octets.size // 16
    return excess((2 * counts_by_place(octets) @ BITS_OF_BYTE - blocks) / math.sqrt(blocks))


def bytes_and_words(octets: Array) -> float:
    """Chi-square of bytes, all and at each place of a block, and of 16-bit words, of neighbours and of blocks."""
    places = counts_by_place(octets)
    words = [np.bincount(x.ravel().view("<u2"), minlength=1 << 16) for x in (octets, in_blocks(octets))]
    return excess([chi_score(x, x.sum() / x.size) for x in (places.sum(0), *places, *words)])


def runs(octets: Array) -> float:
    """Wald and Wolfowitz's number of runs, given the number of ones; lengths against 2**-k, 16 and more as one."""
    bits = np.unpackbits(octets[: LONG // 8], bitorder="little")
    ends, ones = np.flatnonzero(bits[1:] != bits[:-1]), int(np.count_nonzero(bits))
    mean = 2 * ones * (LONG - ones) / LONG
    lengths = np.bincount(np.minimum(np.diff(ends), 16), minlength=17)[1:]
    return excess([(ends.size - mean) / mean * LONG**0.5, chi_score(lengths, lengths.sum() * 0.5 ** np.r_[1:16, 15])])


def lag_scores(a: Array, b: Array) -> Array:
    """Correlation at every lag, around the end, of fp32 sequences of mean 0 and variance 1."""
    first, second = (torch.fft.rfft(torch.from_numpy(x)) for x in (a, b))
    return torch.fft.irfft(first.mul_(second.conj()), len(a)).numpy() / np.float32(len(a) ** 0.5)


def lags(octets: Array) -> float:
    """The lags of neighbours, lanes and tiles; and every lag (whose squares do not add up to a chi-square)."""
    u = unpacked(octets[: LONG // 16])
    scores = lag_scores(u, u)
    return max(excess(scores[LAGS]), peak(scores[1 : len(u) // 2]))


def pairs(rows: Array) -> float:
    """Means of rows and correlations of pairs; sums of integers are exact in fp32."""
    u = torch.from_numpy(unpacked(rows))
    products = (u @ u.T).numpy()[np.triu_indices(len(u), 1)]
    return excess(np.concatenate([u.sum(1).numpy(), products]) / u.shape[1] ** 0.5)


def triples(rows: Array) -> float:
    """Triple products of the first 32 rows."""
    sums = np.zeros((32, 32, 32), dtype=np.float32)
    for part in np.split(rows[:32], 32, axis=1):  # which fit a cache
        u = torch.from_numpy(unpacked(part))
        for i in range(30):
            sums[i] += ((u[i] * u) @ u.T).numpy()
    i, j, k = np.indices(sums.shape)
    return excess(sums[(i < j) & (j < k)] / (8 * rows.shape[1]) ** 0.5)


def repeats(rows: Array) -> float:
    """Blocks that occur before: counters that overlap. By chance, for 64 bits of 196608 blocks, one in 10**9 times."""
    halves = np.ascontiguousarray(in_blocks(rows)).view("<u8")[..., 0]
    return float(halves.size - np.unique(halves).size)


def up_scores(up: Array, chance: float) -> tuple[float, float]:
    """Number of roundings up, and its variance: in groups of 256, against 256 f (1 - f)."""
    variance, groups = chance * (1 - chance), up.size // 256
    spread = float(np.square(up.reshape(groups, 256).sum(1) - 256 * chance).sum()) / (256 * variance) - groups
    deviation = math.sqrt(groups * (2 + (1 - 6 * variance) / (256 * variance)))
    return (int(up.sum()) - up.size * chance) / math.sqrt(up.size * variance), spread / deviation


OF_ONE_STREAM: list[Statistic] = [bias, bits_of_block, bytes_and_words, runs, lags]
OF_MANY_STREAMS: list[Statistic] = [pairs, triples, repeats]
