"""Statistics of the noise that the compiled ops make, on samples large enough to show a bias of one in a thousand.

Seeds are fixed, so a test passes or fails for ever. Signs: randomness.py states the bounds, by chance one failure in a
million. Rounding: 4 standard errors for a mean or a variance. The last tests damage the noise and see each one notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import randomness
import torch
from randomness import LONG, Array, Statistic, excess, half_word_signs, lag_scores, peak, unpacked, up_scores
from torch import Tensor

from zo_ds.maths.directions import Site
from zo_ds.maths.noise import Stream, param_id, step_seed
from zo_ds.maths.update import Term, Update
from zo_ds.ops import api
from zo_ds.ops.builder import CPUOpBuilder
from zo_ds.ops.plan import Plan

pytestmark = [
    pytest.mark.skipif(CPUOpBuilder().load() is None, reason="needs the compiled CPU ops"),
    pytest.mark.usefixtures("one_thread"),
]

RUN, SEED, PARAM = 2024, step_seed(2024, 11), param_id("model.layers.3.mlp.up_proj.weight")
SHORT, MEDIUM, VERY_LONG = 1 << 18, 1 << 20, 1 << 27
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FORMATS = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}  # places after the first, exponent of the least unit
POWERS = [1 << k for k in range(64)]
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "directions": [{"direction": i} for i in (*range(64), *POWERS[6:32], *range(2**32 - 6, 2**32))],
    "steps": [{"seed": step_seed(RUN, i)} for i in (*range(64), *POWERS[6:38])],
    "parameters": [{"param": param_id(f"model.layers.{i}.mlp.up_proj.weight")} for i in range(96)],
    "parameters a bit apart": [{"param": PARAM ^ x} for x in (0, *POWERS[:32])] + [{"param": i} for i in range(63)],
    "run seeds": [{"seed": step_seed(i, 11)} for i in range(96)],
    "run seeds a bit apart": [{"seed": step_seed(RUN ^ x, 11)} for x in (0, *POWERS, *(3 * x for x in POWERS[:31]))],
    "keys a bit apart": [{"seed": SEED ^ x} for x in (0, *POWERS)] + [{"seed": x} for x in POWERS[33:]],
    "tiles": [{"start": i} for i in (*range(0, 48 * SHORT, SHORT), *POWERS[24:63], *(5 * x for x in POWERS[51:60]))],
    "streams": [{"direction": i, "stream": stream} for i in range(20) for stream in Stream][:96],
}


def packed(
    count: int, seed: int = SEED, param: int = PARAM, direction: int = 0, start: int = 0, stream: Stream = Stream.DENSE
) -> Array:
    return np.asarray(api.signs(Site(param, start), seed, [direction], count, stream=stream).numpy()[0])


@pytest.mark.parametrize("stream", list(Stream), ids=lambda stream: stream.name.lower())
@pytest.mark.parametrize("statistic", randomness.OF_ONE_STREAM)
def test_one_stream(statistic: Statistic, stream: Stream) -> None:
    assert statistic(packed(VERY_LONG, stream=stream)) < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_96_streams_are_independent(family: str) -> None:
    rows = np.stack([packed(SHORT, **place) for place in FAMILIES[family]])
    assert len(rows) == 96
    for statistic in randomness.OF_MANY_STREAMS:
        assert statistic(rows) < 1


def test_left_and_right_factors_are_independent() -> None:
    streams = (Stream.LEFT, Stream.RIGHT)
    left, right = np.array([[unpacked(packed(SHORT, direction=i, stream=x)) for i in range(24)] for x in streams])
    u = api.perturb(torch.zeros(256, 1024), Site(PARAM, 0, 1024), SEED, range(24), [1.0] * 24).numpy()
    assert np.array_equal(u, left[:, :256, None] * right[:, None, :1024])
    assert excess(np.stack([lag_scores(a, b) for a, b in zip(left, right, strict=True)])) < 1


def rounded(theta: Tensor, *updates: Update, param: int = PARAM) -> Array:
    result = theta.clone()
    api.apply_([result], [Site(param, decays=True)], Plan.of(RUN, updates))
    return result.double().numpy()


def neighbours(exact: Array, dtype: torch.dtype) -> tuple[Array, Array, Array, Array]:
    """Distance of the format's numbers around a number, how many are below it in magnitude, the fraction left over, and
    the chance of rounding up: the fraction floored to 16 places, which only fp16's subnormals lose by, below 2**-16."""
    digits, least = FORMATS[dtype]
    gap = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1 - digits, least))
    fraction, low = np.modf(np.abs(exact) / gap)
    return gap, low, fraction, np.floor(fraction * 65536) / 65536


WEIGHTS = [(torch.bfloat16, 192, -7), (torch.bfloat16, -176, -14), (torch.float16, 1536, -10)]
WEIGHTS += [(torch.float16, -1408, -17), (torch.float16, -700, -24), (torch.float16, 1, -24)]  # two subnormal


@pytest.mark.parametrize(("dtype", "units", "exponent"), WEIGHTS)
def test_rounding_has_the_mean_and_variance_of_the_fraction(dtype: torch.dtype, units: int, exponent: int) -> None:
    floor = 2.0**-16 if exponent == -24 else 0.0
    rare = (1.5 * 2.0**-16, 1 - 2.0**-18) if units == 1 else ()  # where the floor shows
    for step, wanted in enumerate((1 / 64, 0.25, 1 / 3, 0.5, 0.9, *rare), start=abs(units)):
        theta = torch.full((LONG if wanted in rare else MEDIUM,), math.ldexp(units, exponent), dtype=dtype)
        update = Update(step, (), decay=(1 - wanted) / abs(units))
        exact = float(theta[0].float() * update.shrink)
        gap, low, fraction, chance = map(float, neighbours(np.float64(exact), dtype))
        assert 0 <= fraction - chance <= floor
        assert fraction == pytest.approx(wanted, rel=0.05)
        result = rounded(theta, update) / math.copysign(gap, units)
        up = result == low + 1
        assert bool(((result == low) | up).all())
        assert np.abs(up_scores(up, chance)).max() < 4
        error = 4 * math.sqrt(fraction * (1 - fraction) / len(up))
        assert -floor - error < up.mean() - fraction < error


@HALVES
def test_rounding_is_unbiased_and_independent_of_the_signs(dtype: torch.dtype) -> None:
    """Weights of every size under decay and a direction of the same step; correlations with 24 directions' signs."""
    theta = (torch.randn(MEDIUM, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    theta[::16] *= 2.0**-8  # subnormal
    octets = [packed(LONG, step_seed(RUN, 5), direction=i, stream=x) for x in list(Stream)[:3] for i in range(8)]
    signs = np.stack([unpacked(x[: MEDIUM // 8]) for x in octets])
    update = Update(5, (Term(5, 0, 2.0**-16),), decay=1e-3)
    exact = theta.float() * update.shrink - 2.0**-16 * torch.from_numpy(signs[0])
    gap, low, _, chance = neighbours(exact.double().numpy(), dtype)
    excesses = (np.abs(rounded(theta, update)) / gap > low) - chance
    variances = chance * (1 - chance)
    assert np.abs(excesses.sum()) < 4 * math.sqrt(variances.sum())
    assert abs((excesses**2 - variances).sum()) < 4 * math.sqrt((variances * (1 - 4 * variances)).sum())
    residuals = (excesses / math.sqrt(variances.mean())).astype(np.float32)
    for rows in (signs, np.stack([half_word_signs(x) for x in octets])):
        assert np.abs(rows @ residuals).max() / math.sqrt(MEDIUM) < 4.5
    own = half_word_signs(packed(LONG, step_seed(RUN, 5), stream=Stream.ROUNDING))
    assert own @ residuals / math.sqrt(MEDIUM) < -100
    assert peak(lag_scores(residuals, signs[0])) < 1


def test_rounding_is_independent_between_steps_and_parameters() -> None:
    places = [(step, PARAM) for step in range(48)] + [(11, PARAM ^ x) for x in POWERS[:32]]
    places += [(11, param_id(f"h.{i}.w")) for i in range(16)]
    ones = torch.ones(SHORT, dtype=torch.bfloat16)  # each step takes half the distance to the number below
    ups = [rounded(ones, Update(step, (), 2.0**-9), param=param) == 1 for step, param in places]
    assert randomness.pairs(np.packbits(ups, axis=1, bitorder="little")) < 1


@pytest.mark.parametrize("fresh", [False, True], ids=["one direction", "a direction a step"])
@HALVES
def test_64_roundings_in_one_plan_add_up_to_a_binomial(dtype: torch.dtype, fresh: bool) -> None:
    gap, f, start = 2.0 ** -FORMATS[dtype][0], 1 / 32, 100 * FORMATS[dtype][0]
    updates = [Update(step, (Term(step if fresh else 0, 0, gap * f),)) for step in range(start, start + 64)]
    moves = (rounded(torch.full((MEDIUM,), 1.5, dtype=dtype), *updates) - 1.5) / gap
    law = np.ones(1)
    for _ in updates:
        law = np.convolve(law, [f / 2, 1 - f, f / 2] if fresh else [0, 1 - f, f])
    expected = MEDIUM * (law + law[::-1]) / 2
    observed, often = np.bincount(moves.astype(np.int64) + 64, minlength=129), expected > 20
    counts = [np.append(x[often], x[~often].sum()) for x in (observed, expected)]
    assert excess([randomness.chi_score(*counts)]) < 1


# What is damaged, and what is put there: a bit stuck in 1 % of blocks, for one.
DAMAGES: list[tuple[Statistic, Callable[[Array], tuple[Array, Any]]]] = [
    (randomness.bias, lambda x: (x[::500], 0)),
    (randomness.bits_of_block, lambda x: (x.reshape(-1, 16, 32)[::100, 5], 8 | x.reshape(-1, 16, 32)[::100, 5])),
    (randomness.bytes_and_words, lambda x: (x[::500], 0)),
    (randomness.runs, lambda x: (x[::12], x[::12] & 0xFD | (x[::12] & 1) << 1)),  # 1 % of elements like the one before
    (randomness.lags, lambda x: (x.reshape(-1, 512)[1::100], x.reshape(-1, 512)[::100])),  # and 1 % of tiles
    (randomness.lags, lambda x: (x[5000 : LONG // 80], x[: LONG // 80 - 5000])),  # at a lag that is not listed
    (randomness.pairs, lambda x: (x[1], x[0])),  # the same stream twice
    (randomness.triples, lambda x: (x[2], x[0] ^ x[1])),
    (randomness.repeats, lambda x: (x[1, 512:], x[0, :-512])),  # counters that overlap
]


@pytest.mark.parametrize(("statistic", "damage"), DAMAGES)
def test_damage_to_the_signs_shows(statistic: Statistic, damage: Callable[[Array], tuple[Array, Any]]) -> None:
    octets = packed(VERY_LONG)
    octets = octets if statistic in randomness.OF_ONE_STREAM else octets.reshape(-1, SHORT // 8)[:96]
    np.copyto(*damage(octets))
    assert statistic(octets) > 1


def test_damage_to_the_rounding_shows() -> None:
    generator = np.random.default_rng(1)
    up, u = generator.random(MEDIUM) < 0.25, unpacked(packed(MEDIUM))
    assert np.abs(up_scores(up, 0.25)).max() < 4
    assert abs(up_scores(np.repeat(up[::2], 2), 0.25)[1]) > 4  # one number for two elements
    residuals = generator.choice(np.array([-1, 1], np.float32), MEDIUM)
    assert peak(lag_scores(residuals, u)) < 1
    residuals[::50] = np.roll(u, 3)[::50]  # 2 % follow the sign of an element nearby
    assert peak(lag_scores(residuals, u)) > 1
    up[::50] = True
    assert abs(up_scores(up, 0.25)[0]) > 4
