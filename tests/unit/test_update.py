"""Update version 1 and perturbation: element by element against the oracle, sharded, and rounded as promised."""

from __future__ import annotations

import math
from itertools import pairwise
from unittest.mock import patch

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_ds.maths import directions, noise
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.update import Term, Update, apply_update_, perturb, round_stochastically

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(37,), (1,), (9, 13), (1, 70), (6, 2, 5)]
STRUCTURES = list(NoiseStructure)
RUN_SEED = 0xFEDCBA9876543210
SMALL_CHUNK = 4096
TERMS = (Term(9, 0, 1e-3), Term(9, 2, -0.25), Term(8, 1, 3e-5), Term(9, 7, 0.1), Term(2, 0, -7.7e-4))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bits_of(values: Tensor) -> Tensor:
    """Bit patterns, so that -0 is not 0 and a NaN equals itself."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def weights(count: int, dtype: torch.dtype, scale: float = 0.02, seed: int = 1) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def expected_update(theta: Tensor, param: ParamInfo, structure: NoiseStructure, update: Update, start: int) -> Tensor:
    rounding_seed = oracle.step_seed(RUN_SEED, update.step)
    result = []
    for j, value in enumerate(theta.view(-1).tolist(), start):
        terms = []
        for term in update.terms:
            seed = oracle.step_seed(RUN_SEED, term.step)
            u = oracle.element(seed, param.name, param.shape, term.direction, j, structure.value)
            terms.append((term.coefficient, u))
        bits = oracle.rounding_bits(rounding_seed, oracle.param_id(param.name), j)
        matrix = len(param.shape) >= 2
        result.append(oracle.updated(value, short(theta.dtype), terms, update.decay, bits, is_matrix=matrix))
    return torch.tensor(result, dtype=torch.float64).to(theta.dtype).view(theta.shape)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_update_equals_the_oracle(dtype: torch.dtype, shape: tuple[int, ...], structure: NoiseStructure) -> None:
    param = ParamInfo("h.0.weight", shape, dtype)
    for update in (Update(9, TERMS), Update(9, TERMS, decay=1e-2), Update(3, (), decay=0.3), Update(5, TERMS[2:3])):
        theta = weights(param.numel, dtype).view(shape)
        expected = expected_update(theta, param, structure, update, 0)
        apply_update_(theta, param.site(structure), RUN_SEED, update)
        assert torch.equal(bits_of(theta), bits_of(expected))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.floats(-0.125, 0.125, width=32)
terms = st.builds(Term, st.integers(0, 3), st.integers(0, 9), finite | small)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(finite | small, min_size=4, max_size=4),
    st.lists(terms, max_size=6),
    small,
    st.sampled_from(DTYPES),
    st.sampled_from([NoiseStructure.DENSE, NoiseStructure.GAUSSIAN]),
)
def test_update_of_any_numbers_equals_the_oracle(
    values: list[float], terms: list[Term], decay: float, dtype: torch.dtype, structure: NoiseStructure
) -> None:
    theta, update = torch.tensor(values).to(dtype), Update(2, tuple(terms), decay)
    expected = expected_update(theta, ParamInfo("p", (3, 5), dtype), structure, update, 7)
    apply_update_(theta, ParamInfo("p", (3, 5), dtype).site(structure, 7), RUN_SEED, update)
    assert torch.equal(bits_of(theta), bits_of(expected))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_perturb_equals_the_oracle(dtype: torch.dtype, shape: tuple[int, ...], structure: NoiseStructure) -> None:
    param = ParamInfo("h.0.weight", shape, dtype)
    theta = weights(param.numel, dtype).view(shape)
    before, seed = theta.clone(), oracle.step_seed(RUN_SEED, 4)
    for eps in (1e-3, -1e-3, 0.37):
        u = [oracle.element(seed, param.name, shape, 3, j, structure.value) for j in range(param.numel)]
        values = [
            oracle.perturbed(x, short(dtype), eps, each) for x, each in zip(before.view(-1).tolist(), u, strict=True)
        ]
        expected = torch.tensor(values, dtype=torch.float64).to(dtype).view(shape)
        found = perturb(theta, param.site(structure), seed, 3, eps)
        assert torch.equal(bits_of(found), bits_of(expected))
        assert torch.equal(theta, before)
        out = torch.full_like(theta, math.nan)
        assert perturb(theta, param.site(structure), seed, 3, eps, out=out) is out
        assert torch.equal(bits_of(out), bits_of(expected))


def test_decay_is_for_matrices_only() -> None:
    for shape, kept in (((12,), 1.0), ((12, 1), 0.5), ((3, 2, 2), 0.5)):
        theta = torch.ones(shape)
        apply_update_(theta, ParamInfo("p", shape, theta.dtype).site(STRUCTURES[0]), 0, Update(0, (), decay=0.5))
        assert torch.equal(theta, torch.full(shape, kept))


def test_order_of_terms_is_part_of_the_definition() -> None:
    param = ParamInfo("p", (4096,), torch.float32)
    results = []
    for terms in (TERMS, TERMS[::-1]):
        theta = weights(4096, torch.float32)
        expected = expected_update(theta[:300], param, NoiseStructure.DENSE, Update(9, terms), 0)
        apply_update_(theta, param.site(NoiseStructure.DENSE), RUN_SEED, Update(9, terms))
        assert torch.equal(theta[:300], expected)
        results.append(theta)
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 13000), max_size=6),
    st.sampled_from([(13000,), (130, 100), (2, 6500), (6500, 2)]),
    st.sampled_from(DTYPES),
    st.sampled_from(STRUCTURES),
    st.sampled_from([SMALL_CHUNK, 2 * SMALL_CHUNK, 3 * SMALL_CHUNK]),
)
def test_shards_and_chunks_change_no_bit(
    cuts: list[int], shape: tuple[int, ...], dtype: torch.dtype, structure: NoiseStructure, chunk: int
) -> None:
    param = ParamInfo("p", shape, dtype)
    theta = weights(param.numel, dtype).view(shape)
    update, seed = Update(9, TERMS, decay=1e-3), noise.step_seed(RUN_SEED, 9)
    moved = perturb(theta, param.site(structure), seed, 1, 1e-2)
    whole = theta.clone()
    apply_update_(whole, param.site(structure), RUN_SEED, update)
    edges = [0, *sorted(cuts), param.numel]
    with patch.object(directions, "CHUNK", chunk):
        for start, stop in pairwise(edges):
            shard = theta.view(-1)[start:stop].clone()
            found = perturb(shard, param.site(structure, start), seed, 1, 1e-2)
            assert torch.equal(found, moved.view(-1)[start:stop])
            apply_update_(shard, param.site(structure, start), RUN_SEED, update)
            assert torch.equal(shard, whole.view(-1)[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("start", [2**20 - 40, 2**32 - 40, 2**40 + 12345])
def test_far_slices_equal_the_oracle(start: int, dtype: torch.dtype) -> None:
    param = ParamInfo("wte.weight", (2**21, 2**20), dtype)
    for structure in STRUCTURES:
        theta, update = weights(80, dtype), Update(9, TERMS, decay=1e-2)
        expected = expected_update(theta, param, structure, update, start)
        apply_update_(theta, param.site(structure, start), RUN_SEED, update)
        assert torch.equal(theta, expected)


@settings(max_examples=400, deadline=None)
@given(st.floats(width=32, allow_nan=False), st.integers(0, 65535), st.sampled_from(HALVES))
def test_stochastic_rounding_equals_the_oracle(value: float, bits: int, dtype: torch.dtype) -> None:
    found = round_stochastically(torch.tensor([value]), dtype, torch.tensor([bits], dtype=torch.int32))
    expected = torch.tensor([oracle.stochastic(value, short(dtype), bits)], dtype=torch.float64).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(bits_of(found), bits_of(expected))


@pytest.mark.parametrize("exponents", [(-150, -120), (-26, -13), (-20, 17), (120, 128)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_stochastic_rounding_gives_one_of_the_two_neighbours(dtype: torch.dtype, exponents: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    powers = torch.empty(2000, dtype=torch.float64).uniform_(*exponents, generator=generator)
    values = (torch.randn(2000, generator=generator, dtype=torch.float64).sign() * 2.0**powers).float()
    values = values[values.isfinite()]
    bits = torch.randint(0, 65536, values.shape, generator=generator, dtype=torch.int32)
    found = round_stochastically(values, dtype, bits)
    assert found.tolist() == [
        oracle.stochastic(x, short(dtype), r) for x, r in zip(values.tolist(), bits.tolist(), strict=True)
    ]
    towards_zero = round_stochastically(values, dtype, torch.zeros_like(bits))
    away = (bits_of(towards_zero) + 1).view(dtype)
    exact = towards_zero.double() == values.double()
    finite = towards_zero.isfinite()
    assert torch.equal(finite, values.abs().double() < 2.0 ** (oracle.FORMATS[short(dtype)][2] + 1))
    assert bool((towards_zero.double().abs() <= values.double().abs())[finite].all())
    assert bool((away.double().abs() > values.double().abs())[finite].all())
    assert bool(((found == towards_zero) | ((found == away) & ~exact)).all())


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_exact_values_and_specials_stay_for_all_bits(dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)  # all 65536 patterns, NaN and infinities too
    for bits in (0, 1, 0x7FFF, 0x8000, 65535):
        found = round_stochastically(every.float(), dtype, torch.full((65536,), bits, dtype=torch.int32))
        assert torch.equal(found.isnan(), every.isnan())
        assert torch.equal(bits_of(found)[~every.isnan()], bits_of(every)[~every.isnan()])
        nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
        assert bool(round_stochastically(nans, dtype, torch.full((4,), bits, dtype=torch.int32)).isnan().all())


def test_overflow_goes_to_infinity_and_underflow_to_zero() -> None:
    def rounded(value: float, dtype: torch.dtype, bits: int) -> float:
        return round_stochastically(torch.tensor([value]), dtype, torch.tensor([bits], dtype=torch.int32)).item()

    largest = {torch.float16: 65504.0, torch.bfloat16: float(torch.finfo(torch.bfloat16).max)}
    between = {torch.float16: 65520.0, torch.bfloat16: largest[torch.bfloat16] * (1 + 2.0**-9)}
    for dtype in HALVES:
        for sign in (1, -1):
            assert rounded(sign * between[dtype], dtype, 0) == sign * largest[dtype]
            assert rounded(sign * between[dtype], dtype, 65535) == sign * math.inf
    assert rounded(65536.0, torch.float16, 0) == math.inf
    assert rounded(torch.finfo(torch.float32).max, torch.float16, 0) == math.inf
    tiny = 2.0**-25  # half the smallest fp16 number
    assert [rounded(-tiny, torch.float16, bits) for bits in (32767, 32768)] == [0.0, -(2.0**-24)]
    assert math.copysign(1, rounded(-tiny, torch.float16, 0)) == -1
    denormal = 2.0**-134  # half the smallest bf16 number, itself an fp32 denormal
    assert [rounded(denormal, torch.bfloat16, bits) for bits in (32767, 32768)] == [0.0, 2.0**-133]
    assert rounded(2.0**-149, torch.float16, 65535) == 0.0


@pytest.mark.parametrize("value", [0.1, -0.3, 1.0 + 2.0**-14, -7.77e-6, 3.3e-8], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    count = 1 << 18
    values = torch.full((count,), value)
    found = round_stochastically(values, dtype, noise.rounding_bits(7, 7, 0, count)).double()
    assert found.unique().numel() == 2
    error = abs(float(found.mean()) - float(values[0].double()))
    assert error < 4 * float(found.std()) / math.sqrt(count)


def test_small_steps_survive_stochastic_rounding_only() -> None:
    """Two hundred steps of 1/40 of the gap between bf16 numbers: nearest rounding never moves, stochastic arrives."""
    count, steps = 4096, 200
    param = ParamInfo("p", (64, 64), torch.bfloat16)
    gap, theta = 2.0**-7, torch.full((count,), 1.5, dtype=torch.bfloat16)
    nearest, exact = theta.clone(), theta.double()
    for step in range(steps):
        u = noise.signs(noise.step_seed(RUN_SEED, 0), param.param_id, 0, 0, count)  # the same direction all along
        nearest = (nearest.float() - gap / 40 * u).to(torch.bfloat16)
        exact -= gap / 40 * u.double()
        apply_update_(theta, param.site(NoiseStructure.DENSE), RUN_SEED, Update(step, (Term(0, 0, gap / 40),)))
    assert bool((nearest == 1.5).all())
    travelled = (theta.double() - 1.5) * -u.double()
    wanted = float(((exact - 1.5) * -u.double()).mean())  # 5 gaps
    assert wanted == pytest.approx(5 * gap)
    assert abs(float(travelled.mean()) - wanted) < 4 * float(travelled.std()) / math.sqrt(count)
    assert float(travelled.std()) == pytest.approx(gap * math.sqrt(steps * (1 / 40) * (39 / 40)), rel=0.1)


def test_rounding_differs_from_step_to_step() -> None:
    param = ParamInfo("p", (64, 64), torch.bfloat16)
    results = []
    for step in (0, 1):
        theta = torch.full((4096,), 1.5, dtype=torch.bfloat16)
        apply_update_(theta, param.site(NoiseStructure.DENSE), RUN_SEED, Update(step, (Term(0, 0, 2.0**-8),)))
        results.append(theta)
    agreement = float((results[0] == results[1]).double().mean())
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_stochastic_rounding_refuses_other_formats(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        round_stochastically(torch.ones(3), dtype, torch.zeros(3, dtype=torch.int32))


def test_update_refuses_other_formats() -> None:
    theta = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        apply_update_(theta, ParamInfo("p", (3,), theta.dtype).site(NoiseStructure.DENSE), 0, Update(0, TERMS))
    assert torch.equal(theta, torch.ones(3, dtype=torch.float64))
