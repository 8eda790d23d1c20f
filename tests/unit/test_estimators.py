"""Estimators: formulas written again with numpy, skipped steps, and what FZOO claims of its normalisation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_ds.maths import noise
from zo_ds.maths.directions import NoiseStructure, ParamInfo, scaled_signs
from zo_ds.maths.estimators import Estimator, EstimatorSpec, Probe, SkipReason, SpreadStd, Verdict, probes, verdict

pytestmark = pytest.mark.usefixtures("one_thread")

FZOO, MEZO, ZO_SGD = Estimator.FZOO, Estimator.MEZO, Estimator.ZO_SGD
LR, EPS = 3e-4, 1e-2
loss = st.floats(0.01, 20.0)


def decide(losses: list[float] | np.ndarray, spec: EstimatorSpec, lr: float = LR, eps: float = EPS) -> Verdict:
    return verdict(torch.tensor(np.asarray(losses), dtype=torch.float64), spec, lr, eps)


def assert_skipped(found: Verdict, reason: SkipReason, count: int) -> None:
    assert found.skip is reason
    assert found.coefficients.dtype == torch.float32
    assert found.coefficients.tolist() == [0.0] * count


def test_probes_are_in_the_order_of_the_losses() -> None:
    up, down = [Probe(0, 1), Probe(1, 1), Probe(2, 1), Probe(3, 1)], [Probe(i, -1) for i in range(4)]
    assert list(probes(EstimatorSpec(FZOO, 4))) == [Probe(0, 0), *up]
    assert list(probes(EstimatorSpec(ZO_SGD, 4))) == [Probe(0, 0), *up]
    assert list(probes(EstimatorSpec(MEZO, 4))) == up + down


@settings(deadline=None)
@given(st.lists(loss, min_size=5, max_size=20), st.sampled_from(list(SpreadStd)), st.sampled_from([1e-8, 0.5, 3.0]))
def test_fzoo_formula(losses: list[float], convention: SpreadStd, floor: float) -> None:
    count = len(losses) - 1
    spec = EstimatorSpec(FZOO, count, convention, floor, coefficient_cap=math.inf)
    perturbed = np.array(losses[1:])
    mean = math.fsum(perturbed) / count
    divisor = count - 1 if convention is SpreadStd.SAMPLE else count
    spread = math.sqrt(math.fsum((perturbed - mean) ** 2) / divisor)
    assume(spread > 1e-4)  # ties have their own tests
    found = decide(losses, spec)
    assert found.skip is None
    assert found.clean_loss == losses[0]
    assert found.spread == pytest.approx(spread, rel=1e-9)
    expected = LR * (perturbed - losses[0]) / (count * max(spread, floor))
    np.testing.assert_allclose(found.coefficients.double(), expected, rtol=2e-7, atol=1e-30)


def test_fzoo_by_hand() -> None:
    losses = [1.0, 1.0, 2.0, 3.0, 6.0]  # mean of the perturbed 3, squared deviations 4 + 1 + 0 + 9
    sample = decide(losses, EstimatorSpec(FZOO, 4), lr=0.1)
    population = decide(losses, EstimatorSpec(FZOO, 4, SpreadStd.POPULATION), lr=0.1)
    floored = decide(losses, EstimatorSpec(FZOO, 4, spread_floor=5.0), lr=0.1)
    for found, divisor in ((sample, math.sqrt(14 / 3)), (population, math.sqrt(14 / 4)), (floored, 5.0)):
        expected = [0.0, 0.1 / (4 * divisor), 0.2 / (4 * divisor), 0.5 / (4 * divisor)]
        assert found.coefficients.tolist() == pytest.approx(expected, rel=1e-6)
        assert found.clean_loss == 1.0
    assert floored.spread == sample.spread == pytest.approx(math.sqrt(14 / 3))


@settings(deadline=None)
@given(st.lists(st.tuples(loss, loss), min_size=1, max_size=12), st.floats(1e-4, 0.1))
def test_mezo_formula(pairs: list[tuple[float, float]], eps: float) -> None:
    up, down = np.array(pairs).T
    found = decide([*up, *down], EstimatorSpec(MEZO, len(pairs), coefficient_cap=math.inf), eps=eps)
    assert found.skip is None
    assert found.clean_loss == pytest.approx(float(np.mean(pairs)))
    expected = LR * (up - down) / (2 * eps * len(pairs))
    np.testing.assert_allclose(found.coefficients.double(), expected, rtol=2e-7, atol=1e-30)


@settings(deadline=None)
@given(st.lists(loss, min_size=2, max_size=12), st.floats(1e-4, 0.1))
def test_zo_sgd_formula(losses: list[float], eps: float) -> None:
    count = len(losses) - 1
    found = decide(losses, EstimatorSpec(ZO_SGD, count, coefficient_cap=math.inf), eps=eps)
    assert found.skip is None
    assert found.clean_loss == losses[0]
    expected = LR * (np.array(losses[1:]) - losses[0]) / (eps * count)
    np.testing.assert_allclose(found.coefficients.double(), expected, rtol=2e-7, atol=1e-30)


@pytest.mark.parametrize("estimator", list(Estimator))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_skips_the_step(estimator: Estimator, bad: float) -> None:
    spec = EstimatorSpec(estimator, 4)
    for place in range(len(probes(spec))):
        losses = [1.0 + 0.01 * i for i in range(len(probes(spec)))]
        assert decide(losses, spec).skip is None
        losses[place] = bad
        assert_skipped(decide(losses, spec), SkipReason.NON_FINITE, 4)


@settings(deadline=None)
@given(st.integers(4, 65), loss, loss, st.sampled_from(list(SpreadStd)))
def test_fzoo_skips_ties_of_the_perturbed_losses(count: int, clean: float, tied: float, convention: SpreadStd) -> None:
    spec = EstimatorSpec(FZOO, count, convention, coefficient_cap=math.inf)
    found = decide([clean] + [tied] * count, spec, lr=1e-9)
    assert found.spread == 0.0
    assert_skipped(found, SkipReason.ZERO_SPREAD, count)


def test_only_fzoo_skips_ties() -> None:
    for spec, clean in ((EstimatorSpec(MEZO, 4), 2.0), (EstimatorSpec(ZO_SGD, 4), 2.0)):
        found = decide([2.0] * len(probes(spec)), spec)
        assert found.skip is None
        assert found.clean_loss == clean
        assert found.coefficients.tolist() == [0.0] * 4
    kept = decide([3.0] + [2.0] * 4, EstimatorSpec(ZO_SGD, 4))
    assert kept.coefficients.tolist() == pytest.approx([-LR / (EPS * 4)] * 4)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_a_coefficient_above_the_cap_skips_the_whole_step(estimator: Estimator) -> None:
    spec = EstimatorSpec(estimator, 4)
    losses = [1.0, 1.5, 0.5, 1.25, 0.1, 0.9, 1.1, 1.3][: len(probes(spec))]
    free = decide(losses, spec)
    largest = float(free.coefficients.abs().max())
    assert decide(losses, replace(spec, coefficient_cap=largest)).coefficients.tolist() == free.coefficients.tolist()
    capped = decide(losses, replace(spec, coefficient_cap=largest * (1 - 1e-6)))
    assert_skipped(capped, SkipReason.COEFFICIENT_CAP, 4)
    assert_skipped(decide(losses, spec, lr=1e300), SkipReason.COEFFICIENT_CAP, 4)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_a_wrong_number_of_losses_is_an_error(estimator: Estimator) -> None:
    spec = EstimatorSpec(estimator, 4)
    right = len(probes(spec))
    for losses in (torch.ones(right - 1), torch.ones(right + 1), torch.ones(1, right), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"{estimator.value} needs {right} losses"):
            verdict(losses, spec, LR, EPS)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=5, max_size=20), st.floats(1e-3, 1e3), st.floats(1e-5, 1.0))
def test_fzoo_does_not_depend_on_the_scale_of_the_loss_or_on_eps(grid: list[int], factor: float, eps: float) -> None:
    losses = np.array(grid) / 1e5
    assume(len(set(grid[1:])) > 1)
    spec = EstimatorSpec(FZOO, len(grid) - 1, spread_floor=1e-12, coefficient_cap=math.inf)
    reference, scaled = decide(losses, spec), decide(losses * factor, spec, eps=eps)
    assert reference.skip is scaled.skip is None
    largest = float(reference.coefficients.abs().max())
    np.testing.assert_allclose(scaled.coefficients, reference.coefficients, rtol=1e-5, atol=1e-6 * largest)


class Logistic:
    """Mean logistic loss of 32 random examples in 2304 weights, seen as one matrix, with its gradient."""

    shape = (48, 48)
    eps = 1e-4

    def __init__(self, structure: NoiseStructure) -> None:
        generator = torch.Generator().manual_seed(5)
        self.param, self.structure = ParamInfo("w", self.shape, torch.float32), structure
        self.inputs = torch.randn(32, self.param.numel, generator=generator)
        self.theta = 0.02 * torch.randn(self.param.numel, generator=generator, dtype=torch.float64)
        self.labels = torch.randn(32, generator=generator).sign().double()
        self.margins = self.inputs.double() @ self.theta
        weights = -self.labels * torch.sigmoid(-self.labels * self.margins) / 32
        self.grad = self.inputs.double().T @ weights
        self.unit = self.grad / self.grad.norm()

    def directions(self, step: int, count: int) -> Tensor:
        device = torch.device("cpu")
        seed, numbers = noise.step_seed(77, step), range(count)
        signs = scaled_signs(self.param.site(self.structure), seed, numbers, [1.0] * count, 0, self.param.numel, device)
        return torch.stack([*signs])

    def losses(self, directions: Tensor) -> Tensor:
        """l_0, l_1, ..., l_N in fp64."""
        moved = self.margins + self.eps * (directions @ self.inputs.T).double()
        margins = torch.cat((self.margins.unsqueeze(0), moved))
        return torch.nn.functional.softplus(-self.labels * margins).mean(dim=1)


@pytest.mark.parametrize("structure", list(NoiseStructure))
def test_spread_over_eps_approaches_the_norm_of_the_gradient(structure: NoiseStructure) -> None:
    problem, errors = Logistic(structure), {}
    for count in (16, 256):
        ratios = []
        for step in range(24):
            found = verdict(
                problem.losses(problem.directions(step, count)), EstimatorSpec(FZOO, count), 1e-4, problem.eps
            )
            ratios.append(found.spread / (problem.eps * float(problem.grad.norm())))
        errors[count] = math.sqrt(np.mean((np.array(ratios) - 1) ** 2))
        assert np.mean(ratios) == pytest.approx(1, abs=0.1 if count == 16 else 0.03)
    assert errors[256] < 0.08  # 1 / sqrt(2 * 255) = 0.044 for normal differences
    assert errors[256] < errors[16] / 2  # sqrt(16) in the limit


def test_the_mean_step_is_lr_along_the_unit_gradient() -> None:
    problem, count, lr = Logistic(NoiseStructure.DENSE), 64, 1e-3
    total, lengths = torch.zeros(problem.param.numel, dtype=torch.float64), []
    left = {}
    for step in range(1024):
        directions = problem.directions(step, count)
        found = verdict(problem.losses(directions), EstimatorSpec(FZOO, count), lr, problem.eps)
        assert found.skip is None
        move = (found.coefficients @ directions).double()
        lengths.append(float(move.norm()))
        total += move
        mean = total / (step + 1)
        left[step + 1] = float((mean - (mean @ problem.unit) * problem.unit).norm()) / lr
    assert float(mean @ problem.unit) == pytest.approx(lr, rel=0.05)
    # A single step is mostly orthogonal, sqrt(d / N) = 6 times lr; the mean of K steps is sqrt(K) times less so.
    assert np.mean(lengths) == pytest.approx(lr * math.sqrt(problem.param.numel / count), rel=0.05)
    for steps in (64, 1024):
        assert left[steps] == pytest.approx(math.sqrt(problem.param.numel / count / steps), rel=0.1)
    assert left[1024] < 0.2


def test_a_step_lowers_the_loss_as_much_as_a_gradient_step_of_that_length() -> None:
    problem, count, lr = Logistic(NoiseStructure.DENSE), 64, 1e-5
    gains = []
    for step in range(64):
        directions = problem.directions(step, count)
        found = verdict(problem.losses(directions), EstimatorSpec(FZOO, count), lr, problem.eps)
        move = (found.coefficients @ directions).double()
        margins = problem.margins - problem.inputs.double() @ move
        after = torch.nn.functional.softplus(-problem.labels * margins).mean()
        gains.append(found.clean_loss - float(after))
    assert min(gains) > 0
    assert np.mean(gains) == pytest.approx(lr * float(problem.grad.norm()), rel=0.05)
