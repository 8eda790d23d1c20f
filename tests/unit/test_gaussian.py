"""Gaussian directions: the table of quantiles, known answers, moments, independence, and a run that can be replayed.

Statistics come from fixed seeds and are bounded as in test_statistics.py: by chance, one failure in a million.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from randomness import Array, chi_score, excess, lag_scores, peak
from torch import Tensor

import zo_ds
from tests.conftest import STORES, tiny_model, weights_of, zo_batch
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.resume import open_run
from zo_ds.journal.history import read_journal
from zo_ds.journal.replay import replay_
from zo_ds.maths import noise
from zo_ds.maths.directions import NoiseStructure, ParamInfo, Site
from zo_ds.ops import api

pytestmark = pytest.mark.usefixtures("one_thread")

RUN, SEED, PARAM = 2024, noise.step_seed(2024, 11), noise.param_id("model.layers.3.mlp.up_proj.weight")
TABLE_SHA256 = "6228172c5241ce1fe37b99f6cb1a7f9cfda9ed9aaf1f8682e119328028b2fd06"
HALF = 1 << 15
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
GOLDEN = [  # run seed, step, direction, name, offset; five half-words, and the first two normals
    (
        *(0, 0, 0, "w", 0),
        *("2b72 a464 b152 0188 0467", [0.4391332268714905, -0.36423808336257935]),
    ),
    (
        *(42, 7, 3, Q_PROJ, 4093),
        *("3c0d 9f9c 51cc b724 167c", [0.626733660697937, -0.31464123725891113]),
    ),
    (
        *(2**64 - 1, 999999, 255, "lm_head.weight", 2**32 - 2),
        *("aa30 5f48 5a73 ffbb 967e", [-0.42561042308807373, 1.1368639469146729]),
    ),
    (
        *(1, 2**40, 2**32 - 1, "é/μ", 2**44 + 777),
        *("4760 4f19 7167 a7ab e40e", [0.7682091593742371, 0.874163031578064]),
    ),
]
COUNT, SHORT = 1 << 23, 1 << 17


def made(
    count: int, seed: int = SEED, param: int = PARAM, direction: int = 0, start: int = 0, gaussian: bool = True
) -> Array:
    """Directions by the compiled ops, where there are any."""
    site = Site(param, start, gaussian=gaussian)
    return np.asarray(api.perturb(torch.zeros(count), site, seed, [direction], [1.0])[0].numpy())


def test_the_table_has_the_same_bits_everywhere() -> None:
    table = noise.normal_table()
    assert table.dtype == torch.float32
    assert torch.equal(table[HALF:], -table[:HALF])
    assert hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest() == TABLE_SHA256
    assert table[:HALF].tolist() == oracle.quantiles()


def test_no_quantile_is_near_a_boundary_of_rounding() -> None:
    """An error of 1000 fp64 units, of a library or of the constant, would change no bit."""
    exact = [NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * HALF)) for i in range(HALF)]
    scale = math.sqrt(HALF / math.fsum(z * z for z in exact))
    assert scale == pytest.approx(1.0000101408279616, abs=1e-15)
    for z in exact:
        units = Fraction(math.frexp(z * scale)[0]) * 2**24
        assert abs(units - math.floor(units) - Fraction(1, 2)) * 2**29 > 1000


def test_moments_of_the_table_are_those_that_are_stated() -> None:
    values = noise.normal_table().tolist()
    powers = [sum(Fraction(z) ** k for z in values[:HALF]) / HALF for k in (2, 4)]
    assert sum(values) == 0
    assert float(powers[0]) == 0.9999999994289311
    assert max(values) == -min(values) == 4.324963092803955
    assert float(powers[1]) == pytest.approx(2.99925, abs=5e-6)  # 3 for a normal


@pytest.mark.parametrize(("run_seed", "step", "direction", "name", "offset", "words", "normals"), GOLDEN)
def test_golden_values(
    run_seed: int, step: int, direction: int, name: str, offset: int, words: str, normals: list[float]
) -> None:
    seed, param = noise.step_seed(run_seed, step), noise.param_id(name)
    expected = [int(word, 16) for word in words.split()]
    assert noise.half_words(seed, param, direction, offset, 5, stream=noise.Stream.GAUSSIAN).tolist() == expected
    found = noise.normals(seed, param, direction, offset, 5)
    assert torch.equal(found, noise.normal_table()[expected])
    assert found[:2].tolist() == normals
    assert np.array_equal(made(5, seed, param, direction, offset), found.numpy())


offsets = st.one_of(st.integers(0, 20000), st.integers(0, 2**44), st.integers(2**35 - 150, 2**35 + 50))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.text(max_size=20), offsets, st.integers(1, 200))
def test_normals_equal_the_oracle(seed: int, direction: int, name: str, offset: int, count: int) -> None:
    param = oracle.param_id(name)
    found = noise.normals(seed, param, direction, offset, count)
    assert found.dtype == torch.float32
    assert found.tolist() == [oracle.normal(seed, param, direction, j) for j in range(offset, offset + count)]


def test_matrices_and_vectors_are_gaussian_and_nothing_else_is() -> None:
    for shape in ((12,), (3, 4), (2, 3, 2)):
        info = ParamInfo("p", shape, torch.float32)
        sites = {structure: info.site(structure, 5) for structure in NoiseStructure}
        assert sites[NoiseStructure.GAUSSIAN] == Site(info.param_id, 5, 0, len(shape) > 1, True)
        assert not sites[NoiseStructure.DENSE].gaussian
        assert not sites[NoiseStructure.FACTORED].gaussian


def moment_scores(z: Array) -> list[float]:
    """z-scores of the first four moments against those of the table."""
    table = noise.normal_table().double()
    scores = []
    for power in (1, 2, 3, 4):
        values = table**power
        mean, spread = float(values.mean()), float(values.std())
        scores.append((float((z.astype(np.float64) ** power).mean()) - mean) / spread * math.sqrt(len(z)))
    return scores


def word_scores(z: Array) -> float:
    """Chi-square of how often each entry of the table occurs."""
    counts = np.bincount(np.searchsorted(np.sort(noise.normal_table().numpy()), z), minlength=2 * HALF)
    return chi_score(counts, len(z) / (2 * HALF))


def test_moments_and_frequencies() -> None:
    for z in np.split(made(COUNT), 4):
        assert excess(moment_scores(z)) < 1
        assert excess([word_scores(z)]) < 1


def test_every_place_of_a_block_is_standard() -> None:
    places = made(COUNT).reshape(-1, 8).astype(np.float64)
    count = len(places)
    assert excess(places.sum(0) / math.sqrt(count)) < 1
    assert excess((np.square(places).sum(0) - count) / math.sqrt(2 * count)) < 1
    assert excess((places.T @ places)[np.triu_indices(8, 1)] / math.sqrt(count)) < 1


def pair_score(rows: Array) -> float:
    """Correlations of pairs of rows, and of pairs of their squares."""
    above = np.triu_indices(len(rows), 1)
    squares = (np.square(rows) - 1) / math.sqrt(2)
    return max(excess((x @ x.T)[above] / math.sqrt(rows.shape[1])) for x in (rows, squares))


FAMILIES: dict[str, list[dict[str, Any]]] = {
    "directions": [{"direction": i} for i in (*range(16), *(1 << k for k in range(4, 20)))],
    "steps": [{"seed": noise.step_seed(RUN, i)} for i in range(32)],
    "parameters": [{"param": noise.param_id(f"model.layers.{i}.mlp.up_proj.weight")} for i in range(32)],
    "run seeds": [{"seed": noise.step_seed(i, 11)} for i in range(32)],
    "ranges": [{"start": i * SHORT} for i in range(16)] + [{"start": 1 << k} for k in range(26, 42)],
    "normals and signs": [{"direction": i, "gaussian": kind} for kind in (True, False) for i in range(16)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_are_uncorrelated(family: str) -> None:
    rows = np.stack([made(SHORT, **place) for place in FAMILIES[family]]).astype(np.float64)
    assert len(rows) == 32
    if family == "normals and signs":
        assert excess(rows[:16] @ rows[16:].T / math.sqrt(SHORT)) < 1
    else:
        assert pair_score(rows) < 1


def test_neighbours_are_uncorrelated() -> None:
    z = made(1 << 20)
    scores = lag_scores(z, z)
    lags = [*range(1, 130), 256, 512, 1024, 2048, 4096, 8192, 131072]
    assert max(excess(scores[lags]), peak(scores[1 : len(z) // 2])) < 1


def test_normals_are_independent_of_the_rounding() -> None:
    """Of the same step and parameter: the streams differ in nothing but their number."""
    z = made(SHORT).astype(np.float64)
    bits = noise.rounding_bits(SEED, PARAM, 0, SHORT).numpy()
    uniform = ((bits + 0.5) / 65536 - 0.5) * math.sqrt(12)
    assert excess(np.array([z @ uniform, np.abs(z) @ uniform / z.std()]) / math.sqrt(SHORT)) < 1


def test_damage_shows() -> None:
    z = made(COUNT)
    assert excess(moment_scores(np.where(np.arange(COUNT) % 200 == 0, np.abs(z), z))) > 1
    assert excess(moment_scores(z * np.float32(1.002))) > 1
    assert excess([word_scores(np.where(np.arange(COUNT) % 100 == 0, z[0], z))]) > 1
    rows = np.stack([made(SHORT, direction=i) for i in range(8)]).astype(np.float64)
    rows[1, ::20] = rows[0, ::20]
    assert pair_score(rows) > 1
    rows[1] = np.abs(rows[0]) * made(SHORT, direction=1, gaussian=False)  # uncorrelated, not independent
    assert pair_score(rows) > 1


def open_engine(store: str = "resident", dtype: torch.dtype = torch.float32, **options: Any) -> ZOEngine:
    settings = {"estimator": "mezo", "noise": "gaussian", "num_directions": 2, "lr": 1e-3, "run_seed": 3, **options}
    return zo_ds.initialize(
        tiny_model("llama", dtype=dtype), {"zero_optimization": STORES[store], "zeroth_order": settings}
    )


@pytest.mark.parametrize("store", ["resident", "zero3-cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_run_is_replayed_bit_for_bit(store: str, dtype: torch.dtype, tmp_path: Path) -> None:
    engine = open_engine(store, dtype, weight_decay=0.3)
    base: dict[str, Tensor] = weights_of(engine)
    digests = [engine.digest()]
    open_run(engine, tmp_path / "j")
    for step in range(5):
        assert engine.step(zo_batch(seed=step)).skip is None
        digests.append(engine.digest())
    assert len(set(digests)) == 6
    journal = read_journal(tmp_path / "j" / "journal")
    assert journal.header.noise is NoiseStructure.GAUSSIAN
    for steps, digest in enumerate(digests):
        tensors = {name: tensor.clone() for name, tensor in base.items()}
        assert replay_(tensors, journal, steps).weights_sha256 == digest
    assert all(torch.equal(tensor, weights_of(engine)[name]) for name, tensor in tensors.items())

    engine.close_journal()
    resumed = open_engine("resident", dtype, weight_decay=0.3)
    open_run(resumed, tmp_path / "j")
    assert (resumed.steps_done, resumed.digest()) == (5, digests[5])


@pytest.mark.parametrize("estimator", ["mezo", "fzoo", "zo_sgd"])
def test_batched_and_sequential_forwards_take_the_same_steps(estimator: str) -> None:
    engines = [
        open_engine(forward=forward, estimator=estimator, num_directions=4) for forward in ("batched", "sequential")
    ]
    steps = [[engine.step(zo_batch(seed=step)).coefficients for step in range(5)] for engine in engines]
    for batched, sequential in zip(*steps, strict=True):
        assert float((batched - sequential).abs().max()) < 2e-3 * float(sequential.abs().max())


def test_mezo_takes_the_steps_of_its_formula() -> None:
    """theta - lr (l+ - l-) / (2 eps) z, with z drawn outside of the package."""
    engine, lr, eps = open_engine(num_directions=1, forward="sequential"), 1e-3, 1e-3
    before, (coefficient,) = weights_of(engine), engine.step(zo_batch()).coefficients.tolist()
    plain = tiny_model("llama").eval()
    seed, name = oracle.step_seed(3, 0), "model.norm.weight"
    z = torch.tensor([oracle.normal(seed, oracle.param_id(name), 0, j) for j in range(before[name].numel())])
    assert torch.equal(weights_of(engine)[name], before[name] - coefficient * z)
    losses = []
    for side in (1, -1):
        with torch.no_grad():
            for parameter_name, parameter in plain.named_parameters():
                whole = noise.normals(seed, oracle.param_id(parameter_name), 0, 0, parameter.numel())
                parameter.copy_(before[parameter_name] + side * eps * whole.view(parameter.shape))
            losses.append(float(plain(**zo_batch()).loss))
    assert coefficient == pytest.approx(lr * (losses[0] - losses[1]) / (2 * eps), rel=1e-3)
