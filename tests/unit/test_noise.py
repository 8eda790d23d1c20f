"""Noise version 1: known answers, an independent implementation, slices, and statistics with stated bounds.

Every z-score comes from fixed seeds, so a test passes or fails for ever. BOUND is 5 standard deviations: by chance one
in 1.7 million independent z-scores lies beyond it, and all tests together look at a few thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_ds.maths import noise
from zo_ds.maths.directions import NoiseStructure, ParamInfo, chunks, scaled_directions

CPU = torch.device("cpu")
BOUND = 5.0
COUNT = 1 << 18
SEED = noise.step_seed(2024, 11)
NAME = "model.layers.3.mlp.up_proj.weight"
PARAM = noise.param_id(NAME)
STREAMS = [noise.Stream.DENSE, noise.Stream.LEFT, noise.Stream.RIGHT]

RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SPLITMIX = [  # the published generator adds the constant to its state before each output
    (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]),
    (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GOLDEN = [  # run seed, step, direction, name, offset; 64 signs each of streams 0, 1, 2 (bit k: element offset + k)
    (0, 0, 0, "w", 0, "820c1a101bdd6174 55dba492d4ca725a efe6c7ac63c87006", "3443 0b54 0106 7957 9358"),
    (42, 7, 3, Q_PROJ, 0, "e0b2c36f41cef6e4 ffca52f059af318e a97d61a1a32656ba", "7685 20ca 8858 3048 0d28"),
    (42, 7, 3, Q_PROJ, 4064, "623071e2a6d303bd 53e2cc44f6dc25a2 bb50dd3bd7b0cf8a", "66f3 5f0d c171 9183 12f3"),
    (
        *(2**64 - 1, 999999, 255, "lm_head.weight", 2**32 - 20),
        *("bf0d97ce38ebabb0 9223c9c5875e03e6 6bce6c13fc4c5b03", "0c28 4b0c 4da1 718d e619"),
    ),
    (
        *(123456789, 10**6, 1, "wte.weight", 2**35 + 12345),
        *("772e6667cd81b036 43bb96e5da541327 9b8146b0a09591b8", "aae3 22a4 aeab 99bb 7b07"),
    ),
    (
        *(1, 2**40, 2**32 - 1, "é/μ", 2**44 + 5 * 4096 + 777),
        *("2bfb98b97bd9588c 11ab9ac000bf5840 b270f05c1cb78f49", "d60c 5c31 3908 2095 9a1a"),
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def unpacked(word: int) -> list[int]:
    return [-1 if word >> k & 1 else 1 for k in range(64)]


@pytest.mark.parametrize(("counter", "key", "answer"), RANDOM123)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    k0, k1 = words(key)
    c0, c1, c2, c3 = words(counter)
    assert list(oracle.philox((c0, c1, c2, c3), (k0, k1))) == words(answer)
    tensors = [torch.tensor([word]) for word in (c0, c1, c2, c3)]
    assert [int(word) for word in noise.philox4x32(*tensors, seed=k0 | k1 << 32)] == words(answer)


@pytest.mark.parametrize(("state", "outputs"), SPLITMIX)
def test_splitmix64_known_answers(state: int, outputs: list[int]) -> None:
    states = [(state + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(len(outputs))]
    assert [noise.splitmix64(x) for x in states] == outputs
    assert [oracle.splitmix64(x) for x in states] == outputs


def test_step_seed_and_param_id_known_answers() -> None:
    assert noise.step_seed(0, 0) == oracle.step_seed(0, 0) == 0xA706DD2F4D197E6F
    assert noise.step_seed(2**64 - 1, 999999) == oracle.step_seed(2**64 - 1, 999999) == 0x1625DB9AB7CDFD28
    assert noise.param_id("w") == oracle.param_id("w") == 0xE421E750
    assert noise.param_id("é/μ") == oracle.param_id("é/μ") == 0xF72A76B4


@pytest.mark.parametrize(("run_seed", "step", "direction", "name", "offset", "signs", "bits"), GOLDEN)
def test_golden_vectors(
    run_seed: int, step: int, direction: int, name: str, offset: int, signs: str, bits: str
) -> None:
    seed, param = noise.step_seed(run_seed, step), noise.param_id(name)
    for stream, word in zip(STREAMS, words(signs), strict=True):
        expected = unpacked(word)
        assert noise.signs(seed, param, direction, offset, 64, stream=stream).tolist() == expected
        assert [oracle.tile_sign(seed, param, direction, stream, offset + k) for k in range(64)] == expected
    assert noise.rounding_bits(seed, param, offset, 5).tolist() == words(bits)
    assert [oracle.rounding_bits(seed, param, offset + k) for k in range(5)] == words(bits)


seeds = st.integers(0, 2**64 - 1)
edges = st.builds(lambda edge, by: edge + by, st.sampled_from([2**32, 2**35, 2**39]), st.integers(-150, 50))
offsets = st.one_of(st.integers(0, 20000), st.integers(0, 2**44), edges)
counts = st.integers(1, 200)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 10**9), st.integers(0, 2**32 - 1), st.text(max_size=20), offsets, counts)
def test_signs_and_rounding_bits_equal_the_oracle(
    run_seed: int, step: int, direction: int, name: str, offset: int, count: int
) -> None:
    seed, param = oracle.step_seed(run_seed, step), oracle.param_id(name)
    assert noise.step_seed(run_seed, step) == seed
    assert noise.param_id(name) == param
    elements = range(offset, offset + count)
    for stream in STREAMS:
        found = noise.signs(seed, param, direction, offset, count, stream=stream)
        assert found.dtype == torch.float32
        assert found.tolist() == [oracle.tile_sign(seed, param, direction, stream, j) for j in elements]
    bits = noise.rounding_bits(seed, param, offset, count)
    assert bits.dtype == torch.int32
    assert bits.tolist() == [oracle.rounding_bits(seed, param, j) for j in elements]


@settings(max_examples=60, deadline=None)
@given(st.data(), seeds, st.lists(st.integers(1, 60), min_size=1, max_size=3), st.sampled_from(list(NoiseStructure)))
def test_scaled_directions_equal_the_oracle(
    data: st.DataObject, seed: int, shape: list[int], structure: NoiseStructure
) -> None:
    info = ParamInfo("p", tuple(shape), torch.float32)
    start = data.draw(st.integers(0, info.numel - 1))
    count = data.draw(st.integers(1, min(150, info.numel - start)))
    scales = {5: 0.1, 0: -3.0, 2**31: 1e-30}
    found = scaled_directions(info.site(structure), seed, list(scales), list(scales.values()), start, count, CPU)
    for (direction, scale), row in zip(scales.items(), found, strict=True):
        u = [oracle.element(seed, "p", shape, direction, j, structure.value) for j in range(start, start + count)]
        assert row.dtype == torch.float32
        assert row.tolist() == [oracle.fp32(oracle.fp32(scale) * x) for x in u]


@settings(max_examples=40, deadline=None)
@given(st.data(), seeds, st.integers(0, 2**36))
def test_a_slice_is_the_slice_of_a_larger_range(data: st.DataObject, seed: int, base: int) -> None:
    size = 3 * noise.TILE
    start = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(1, size - start))
    kinds: list[Callable[[int, int], Tensor]] = [
        lambda a, n: noise.signs(seed, 7, 3, a, n),
        lambda a, n: noise.rounding_bits(seed, 7, a, n),
        lambda a, n: noise.normals(seed, 7, 3, a, n),
    ]
    for produce in kinds:
        assert torch.equal(produce(base + start, count), produce(base, size)[start : start + count])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 5 * 2**20))
def test_chunks_cover_a_range_in_order(start: int, count: int) -> None:
    at = start
    for begin, length in chunks(start, count):
        assert begin == at
        assert 0 < length <= 2**20
        at += length
        assert at == start + count or at % 2**20 == 0
    assert at == start + count


def test_sign_bytes_of_many_directions_are_those_of_each() -> None:
    together = noise.sign_bytes(SEED, PARAM, [4, 0, 9], 5, 2)
    assert together.shape == (3, 1024)
    for row, direction in zip(together, (4, 0, 9), strict=True):
        expected = noise.signs(SEED, PARAM, direction, 5 * noise.TILE, 2 * noise.TILE)
        bits = (row.unsqueeze(1) >> torch.arange(8, dtype=torch.int32)) & 1
        assert torch.equal(1.0 - 2.0 * bits.view(-1).float(), expected)


def z(product: Tensor) -> float:
    return float(product.sum(dtype=torch.float64)) / math.sqrt(product.numel())


def assert_standard_normal(scores: Iterable[float]) -> None:
    """None beyond BOUND, and as much spread as chance gives: too even is as wrong as too uneven."""
    values = torch.tensor(list(scores), dtype=torch.float64)
    assert float(values.abs().max()) < BOUND
    chi_square, n = float((values**2).sum()), len(values)
    assert abs(chi_square - n) < BOUND * math.sqrt(2 * n) + BOUND**2


def families() -> Iterator[tuple[str, list[Tensor]]]:
    eight = range(8)
    yield "directions", [noise.signs(SEED, PARAM, i, 0, COUNT) for i in eight]
    yield "steps", [noise.signs(noise.step_seed(2024, i), PARAM, 0, 0, COUNT) for i in eight]
    yield "run seeds", [noise.signs(noise.step_seed(i, 0), PARAM, 0, 0, COUNT) for i in eight]
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in eight]
    yield "parameters", [noise.signs(SEED, noise.param_id(name), 0, 0, COUNT) for name in names]
    yield "streams", [noise.signs(SEED, PARAM, 0, 0, COUNT, stream=stream) for stream in STREAMS]
    yield "ranges", [noise.signs(SEED, PARAM, 0, start, COUNT) for start in (0, COUNT, 2**32, 2**39, 2**40)]


FAMILIES = dict(families())


@pytest.mark.parametrize("family", FAMILIES)
def test_signs_are_unbiased_and_uncorrelated(family: str) -> None:
    members = FAMILIES[family]
    assert_standard_normal(z(member) for member in members)
    assert_standard_normal(z(a * b) for i, a in enumerate(members) for b in members[:i])


def test_every_place_in_a_tile_is_balanced() -> None:
    tiles = noise.signs(SEED, PARAM, 0, 0, 512 * noise.TILE).view(512, noise.TILE)
    assert_standard_normal(z(column) for column in tiles.T)


def test_every_bit_of_a_block_is_balanced_and_independent_of_the_others() -> None:
    octets = noise.sign_bytes(SEED, PARAM, [0], 0, 256).view(256, 16, 32)
    bits = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.int32)) & 1
    blocks = (1.0 - 2.0 * bits.double()).permute(0, 2, 1, 3).reshape(256 * 32, 128)
    scores = blocks.T @ blocks / math.sqrt(len(blocks))
    assert_standard_normal(blocks.sum(0).div(math.sqrt(len(blocks))).tolist())
    assert_standard_normal(scores[torch.triu(torch.ones(128, 128), 1).bool()].tolist())


def test_neighbouring_elements_and_tiles_are_uncorrelated() -> None:
    u = noise.signs(SEED, PARAM, 0, 0, COUNT)
    lags = [*range(1, 34), 64, 128, 255, 256, 257, 512, 1024, 2048, 4095, 4096, 4097, 8192, 65536]
    assert_standard_normal(z(u[lag:] * u[:-lag]) for lag in lags)
    tiles = u.view(-1, noise.TILE).double()
    pairs = (tiles @ tiles.T / math.sqrt(noise.TILE))[torch.triu(torch.ones(len(tiles), len(tiles)), 1).bool()]
    assert_standard_normal(pairs.tolist())


def test_factored_signs_are_unbiased_and_uncorrelated_between_directions() -> None:
    info = ParamInfo(NAME, (512, 512), torch.float32)
    rank1 = [*scaled_directions(info.site(NoiseStructure.FACTORED), SEED, range(8), [1.0] * 8, 0, 512 * 512, CPU)]
    # A sum over a b^T is a sum over a times a sum over b, so scores are products of two normal ones.
    scores = [z(u) for u in rank1] + [z(a * b) for i, a in enumerate(rank1) for b in rank1[:i]]
    assert max(abs(score) for score in scores) < BOUND**2
    assert 0.2 < sum(score**2 for score in scores) / len(scores) < 5.0
    for u in rank1:
        matrix = u.view(512, 512)
        assert torch.equal(matrix, torch.outer(matrix[:, 0], matrix[0] * matrix[0, 0]))


def test_rounding_bits_are_uniform() -> None:
    bits = noise.rounding_bits(SEED, PARAM, 0, COUNT).long()
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 65536
    for octet in (bits & 0xFF, bits >> 8):
        expected = COUNT / 256
        chi_square = float((octet.bincount(minlength=256) - expected).square().sum()) / expected
        assert abs(chi_square - 255) < BOUND * math.sqrt(2 * 255)
    uniform = (bits.double() + 0.5) / 65536 - 0.5
    assert_standard_normal(float(part.mean()) * math.sqrt(12 * len(part)) for part in uniform.view(-1, 8).T)
    assert_standard_normal(
        float((uniform[lag:] * uniform[:-lag]).mean()) * 12 * math.sqrt(COUNT - lag) for lag in range(1, 33)
    )


def test_rounding_bits_are_independent_of_the_signs() -> None:
    bits = noise.rounding_bits(SEED, PARAM, 0, COUNT)
    planes = [1.0 - 2.0 * ((bits >> place) & 1).float() for place in range(16)]
    for stream in STREAMS:
        others = [noise.signs(SEED, PARAM, direction, 0, COUNT, stream=stream) for direction in range(4)]
        assert_standard_normal(z(plane * u) for plane in planes for u in others)
    # The same place of the same block of the two streams, where a shared counter would show.
    octets = noise.sign_bytes(SEED, PARAM, [0], 0, 8).view(8, 16, 32).transpose(1, 2).reshape(-1)
    signs = 1.0 - 2.0 * ((octets.unsqueeze(1) >> torch.arange(8, dtype=torch.int32)) & 1).view(-1).float()
    halves = noise.rounding_bits(SEED, PARAM, 0, len(signs) // 16)
    aligned = 1.0 - 2.0 * ((halves.unsqueeze(1) >> torch.arange(16, dtype=torch.int32)) & 1).view(-1).float()
    assert abs(z(signs * aligned)) < BOUND
