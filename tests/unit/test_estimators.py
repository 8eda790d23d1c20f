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
from zo_ds.maths.directions import NoiseStructure, ParamInfo, scaled_directions
from zo_ds.maths.estimators import (
    Baseline,
    Estimator,
    EstimatorSpec,
    Probe,
    SkipReason,
    SpreadStd,
    Verdict,
    follow_up,
    forwards,
    probes,
    settle,
    verdict,
)
from zo_ds.maths.momentum import with_momentum

pytestmark = pytest.mark.usefixtures("one_thread")

FZOO, FZOO_R, MEZO, ZO_SGD = Estimator.FZOO, Estimator.FZOO_R, Estimator.MEZO, Estimator.ZO_SGD
SIGN, CONS = Estimator.ZO_SGD_SIGN, Estimator.ZO_SGD_CONS
CLEAN, MEAN = Baseline.CLEAN, Baseline.MEAN
LR, EPS = 3e-4, 1e-2
loss = st.floats(0.01, 20.0)


SPECS = [
    EstimatorSpec(estimator, 1 if estimator is CONS else 4, baseline=baseline)
    for estimator in Estimator
    for baseline in (Baseline if estimator in (FZOO, FZOO_R, ZO_SGD) else [CLEAN])
]
each_estimator = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.estimator.value}-{spec.baseline.value}"
)


def decide(
    losses: list[float] | np.ndarray,
    spec: EstimatorSpec,
    lr: float = LR,
    eps: float = EPS,
    previous: float | None = None,
) -> Verdict:
    return verdict(torch.tensor(np.asarray(losses), dtype=torch.float64), spec, lr, eps, previous)


def some_losses(spec: EstimatorSpec) -> list[float]:
    return [1.0, 1.5, 0.5, 1.25, 0.1, 0.9, 1.1, 1.3][: len(probes(spec))]


def assert_skipped(found: Verdict, reason: SkipReason, count: int) -> None:
    assert found.skip is reason
    assert found.coefficients.dtype == torch.float32
    assert found.coefficients.tolist() == [0.0] * count


def test_probes_are_in_the_order_of_the_losses() -> None:
    up, down = [Probe(0, 1), Probe(1, 1), Probe(2, 1), Probe(3, 1)], [Probe(i, -1) for i in range(4)]
    assert list(probes(EstimatorSpec(FZOO, 4))) == [Probe(0, 0), *up]
    assert list(probes(EstimatorSpec(ZO_SGD, 4))) == [Probe(0, 0), *up]
    assert list(probes(EstimatorSpec(MEZO, 4))) == up + down
    assert list(probes(EstimatorSpec(FZOO_R, 4))) == [Probe(0, 0), *up]
    for estimator in (FZOO, FZOO_R, ZO_SGD):
        assert list(probes(EstimatorSpec(estimator, 4, baseline=MEAN))) == up
    assert list(probes(EstimatorSpec(SIGN, 4))) == up + down
    assert list(probes(EstimatorSpec(CONS, 1))) == [Probe(0, 1), Probe(0, -1)]


def test_forwards_of_a_step() -> None:
    counts = {(spec.estimator, spec.baseline): forwards(spec) for spec in SPECS}
    assert counts == {
        **{(estimator, CLEAN): 5 for estimator in (FZOO, FZOO_R, ZO_SGD)},
        **{(estimator, MEAN): 4 for estimator in (FZOO, FZOO_R, ZO_SGD)},
        (MEZO, CLEAN): 8,
        (SIGN, CLEAN): 8,
        (CONS, CLEAN): 5,
    }


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


@each_estimator
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_skips_the_step(spec: EstimatorSpec, bad: float) -> None:
    for place in range(len(probes(spec))):
        losses = [1.0 + 0.01 * i for i in range(len(probes(spec)))]
        assert decide(losses, spec).skip is None
        losses[place] = bad
        assert_skipped(decide(losses, spec), SkipReason.NON_FINITE, spec.num_directions)


@settings(deadline=None)
@given(st.integers(4, 65), loss, loss, st.sampled_from(list(SpreadStd)))
def test_fzoo_skips_ties_of_the_perturbed_losses(count: int, clean: float, tied: float, convention: SpreadStd) -> None:
    spec = EstimatorSpec(FZOO, count, convention, coefficient_cap=math.inf)
    found = decide([clean] + [tied] * count, spec, lr=1e-9)
    assert found.spread == 0.0
    assert_skipped(found, SkipReason.ZERO_SPREAD, count)


@each_estimator
def test_only_what_divides_by_the_spread_skips_ties(spec: EstimatorSpec) -> None:
    found = decide([2.0] * len(probes(spec)), spec, previous=0.1)
    assert found.skip is (SkipReason.ZERO_SPREAD if spec.estimator in (FZOO, FZOO_R) else None)
    assert (found.clean_loss, found.spread) == (2.0, 0.0)
    assert found.coefficients.tolist() == [0.0] * spec.num_directions


def test_ties_against_another_clean_loss() -> None:
    kept = decide([3.0] + [2.0] * 4, EstimatorSpec(ZO_SGD, 4))
    assert kept.coefficients.tolist() == pytest.approx([-LR / (EPS * 4)] * 4)


@each_estimator
def test_a_coefficient_above_the_cap_skips_the_whole_step(spec: EstimatorSpec) -> None:
    losses = some_losses(spec)
    free = decide(losses, spec)
    largest = float(free.coefficients.abs().max())
    assert decide(losses, replace(spec, coefficient_cap=largest)).coefficients.tolist() == free.coefficients.tolist()
    capped = decide(losses, replace(spec, coefficient_cap=largest * (1 - 1e-6)))
    assert_skipped(capped, SkipReason.COEFFICIENT_CAP, spec.num_directions)
    assert_skipped(decide(losses, spec, lr=1e300), SkipReason.COEFFICIENT_CAP, spec.num_directions)


@each_estimator
def test_a_wrong_number_of_losses_is_an_error(spec: EstimatorSpec) -> None:
    right = len(probes(spec))
    for losses in (torch.ones(right - 1), torch.ones(right + 1), torch.ones(1, right), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=f"{spec.estimator.value} needs {right} losses"):
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


def spread_of(losses: np.ndarray, convention: SpreadStd) -> float:
    mean = math.fsum(losses) / len(losses)
    divisor = len(losses) - 1 if convention is SpreadStd.SAMPLE else len(losses)
    return math.sqrt(math.fsum((losses - mean) ** 2) / divisor)


@given(
    st.lists(loss, min_size=4, max_size=12),
    st.lists(loss, min_size=4, max_size=12),
    st.floats(-100, 100),
    st.sampled_from(list(SpreadStd)),
)
def test_fzoo_r_formula(now: list[float], before: list[float], level: float, convention: SpreadStd) -> None:
    """Each half of the spread has its own mean: at what level another batch's losses lie does not matter."""
    spec = EstimatorSpec(FZOO_R, len(now) - 1, convention, coefficient_cap=math.inf)
    own, other = spread_of(np.array(now[1:]), convention), spread_of(np.array(before) + level, convention)
    assume(own > 1e-4 and other > 1e-4)
    first, reused = decide(now, spec), decide(now, spec, previous=other)
    assert first.spread == reused.spread == pytest.approx(own, rel=1e-9)
    if spec.num_directions > 3:
        assert torch.equal(first.coefficients, decide(now, replace(spec, estimator=FZOO)).coefficients)
    both = math.sqrt((own**2 + other**2) / 2)
    expected = LR * (np.array(now[1:]) - now[0]) / (spec.num_directions * both)
    np.testing.assert_allclose(reused.coefficients.double(), expected, rtol=2e-7, atol=1e-30)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.estimator is not FZOO_R], ids=str)
def test_only_fzoo_r_looks_at_the_spread_before(spec: EstimatorSpec) -> None:
    losses = some_losses(spec)
    assert torch.equal(decide(losses, spec, previous=7.0).coefficients, decide(losses, spec).coefficients)


@given(st.lists(loss, min_size=4, max_size=12), st.sampled_from([FZOO, FZOO_R, ZO_SGD]), st.floats(1e-3, 0.5))
def test_mean_baseline_leaves_one_out(losses: list[float], estimator: Estimator, previous: float) -> None:
    spec = EstimatorSpec(estimator, len(losses), coefficient_cap=math.inf, baseline=MEAN)
    values = np.array(losses)
    own = spread_of(values, SpreadStd.SAMPLE)
    assume(own > 1e-4)
    found = decide(losses, spec, previous=previous)
    scale = {FZOO: own, FZOO_R: math.sqrt((own**2 + previous**2) / 2), ZO_SGD: EPS}[estimator]
    others = [math.fsum(losses[:i] + losses[i + 1 :]) / (len(losses) - 1) for i in range(len(losses))]
    expected = LR * (values - others) / (len(losses) * scale)
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(found.coefficients.double(), expected, rtol=1e-6, atol=1e-7 * largest)
    assert found.clean_loss == pytest.approx(float(values.mean()))
    assert found.spread == pytest.approx(own, rel=1e-9)
    assert abs(float(found.coefficients.double().sum())) <= 1e-6 * largest * len(losses)


@given(st.lists(st.tuples(loss, loss), min_size=1, max_size=12), st.floats(1e-4, 0.1))
def test_sign_formula(pairs: list[tuple[float, float]], eps: float) -> None:
    up, down = zip(*pairs, strict=True)
    found = decide([*up, *down], EstimatorSpec(SIGN, len(pairs)), eps=eps)
    expected = [LR / len(pairs) * ((u > d) - (u < d)) for u, d in pairs]
    assert found.coefficients.tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
    assert found.clean_loss == pytest.approx(float(np.mean(pairs)))


@given(loss, loss, st.tuples(loss, loss, loss))
def test_cons_takes_the_best_of_three(up: float, down: float, outcomes: tuple[float, float, float]) -> None:
    spec = EstimatorSpec(CONS, 1, coefficient_cap=math.inf)
    first = decide([up, down], spec)
    assert torch.equal(first.coefficients, decide([up, down], replace(spec, estimator=MEZO)).coefficients)
    step = float(first.coefficients[0])
    assert follow_up(spec, first) == (0.0, step, -step)
    found = settle(first, follow_up(spec, first), torch.tensor(outcomes, dtype=torch.float64))
    at_theta, forward, back = outcomes
    wanted = 0.0 if at_theta <= min(forward, back) else step if forward <= back else -step
    assert found.coefficients.tolist() == [wanted]
    assert found.coefficients.dtype == torch.float32
    assert (found.skip, found.clean_loss, found.spread) == (None, at_theta, first.spread)


def test_cons_has_no_second_look_at_a_step_that_cannot_be_taken() -> None:
    spec = EstimatorSpec(CONS, 1)
    for bad in (decide([math.nan, 1.0], spec), decide([1.0, 2.0], spec, lr=1e3)):
        assert bad.skip is not None
        assert follow_up(spec, bad) == ()
    first = decide([1.0, 2.0], spec)
    for place in range(3):
        losses = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
        losses[place] = math.nan
        assert_skipped(settle(first, follow_up(spec, first), losses), SkipReason.NON_FINITE, 1)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.estimator is not CONS], ids=str)
def test_other_estimators_have_no_second_look(spec: EstimatorSpec) -> None:
    assert follow_up(spec, decide(some_losses(spec), spec)) == ()


@each_estimator
@given(data=st.data())
def test_directions_may_come_in_any_order(spec: EstimatorSpec, data: st.DataObject) -> None:
    losses = np.array(data.draw(st.lists(loss, min_size=len(probes(spec)), max_size=len(probes(spec)), unique=True)))
    order = np.array(data.draw(st.permutations(range(spec.num_directions))))
    where = [place.direction if place.side == 0 else order[place.direction] for place in probes(spec)]
    index = {(place.direction, place.side): number for number, place in enumerate(probes(spec))}
    moved = losses[[index[int(d), place.side] for d, place in zip(where, probes(spec), strict=True)]]
    free = replace(spec, coefficient_cap=math.inf)
    assume(spread_of(losses, SpreadStd.SAMPLE) > 1e-3)
    one, other = decide(losses, free, previous=0.5), decide(moved, free, previous=0.5)
    np.testing.assert_allclose(other.coefficients, one.coefficients[order], rtol=1e-5, atol=1e-9)


@each_estimator
@given(st.floats(1e-2, 1e2), st.floats(0.1, 10))
def test_what_lr_and_the_loss_are_scaled_by(spec: EstimatorSpec, factor: float, faster: float) -> None:
    """lr multiplies every coefficient; the scale of the loss only those that are not normalised or signs."""
    free, losses = replace(spec, coefficient_cap=math.inf), np.array(some_losses(spec))
    one = decide(losses, free, previous=0.3).coefficients.double()
    scaled = decide(losses * factor, free, lr=LR * faster, previous=0.3 * factor).coefficients.double()
    times = faster if spec.estimator in (FZOO, FZOO_R, SIGN) else faster * factor
    np.testing.assert_allclose(scaled, one * times, rtol=1e-5)


@pytest.mark.parametrize("estimator", [MEZO, SIGN])
@given(pairs=st.lists(st.tuples(loss, loss), min_size=1, max_size=8))
def test_other_sides_give_the_opposite_step(estimator: Estimator, pairs: list[tuple[float, float]]) -> None:
    up, down = zip(*pairs, strict=True)
    spec = EstimatorSpec(estimator, len(pairs), coefficient_cap=math.inf)
    assert torch.equal(decide([*up, *down], spec).coefficients, -decide([*down, *up], spec).coefficients)


@pytest.mark.parametrize(
    ("estimator", "count", "baseline", "why"),
    [
        (FZOO, 3, CLEAN, "use 4 or more"),
        (FZOO, 3, MEAN, "use 4 or more"),
        (FZOO_R, 2, CLEAN, "use 3 or more"),
        (CONS, 2, CLEAN, "set num_directions: 1"),
        (ZO_SGD, 1, MEAN, "use 2 or more"),
        (MEZO, 0, CLEAN, "needs 1 or more"),
        (MEZO, 4, MEAN, "mezo compares two sides"),
        (SIGN, 4, MEAN, "zo_sgd_sign compares two sides"),
        (CONS, 1, MEAN, "zo_sgd_cons compares two sides"),
    ],
)
def test_what_cannot_be_is_refused(estimator: Estimator, count: int, baseline: Baseline, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        EstimatorSpec(estimator, count, baseline=baseline)


def test_without_momentum_a_coefficient_keeps_its_bits() -> None:
    own = torch.tensor([0.1, -3e-7, 0.0, 1e-40])
    assert torch.equal(torch.tensor(with_momentum(own, [], 0.0)), own)


@given(
    st.lists(st.one_of(st.none(), st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=2)), max_size=6),
    st.floats(0.1, 0.99),
)
def test_momentum_by_hand(steps: list[list[float] | None], beta: float) -> None:
    """Each step's coefficients from what the steps before it recorded for their own directions, oldest step first."""
    recorded: list[list[float]] = []
    for at, own in enumerate(steps):
        if own is None:
            recorded.append([])
            continue
        found = with_momentum(torch.tensor(own), recorded[::-1], beta)
        assert len(found) % 2 == 0
        for age in range(len(found) // 2):
            source = steps[at - age] or [0.0, 0.0]
            wanted = [(1 - beta) * beta**age * c for c in source]
            assert found[2 * age : 2 * age + 2] == pytest.approx(wanted, rel=1e-6, abs=1e-40)
        assert all(step is None for step in steps[: at + 1 - len(found) // 2])  # the rest has no terms
        recorded.append(found[:2])


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
        site, ones = self.param.site(self.structure), [1.0] * count
        return torch.stack([*scaled_directions(site, seed, numbers, ones, 0, self.param.numel, device)])

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
