"""The learning rate of a run that was given none: how it scales, and what the literature used."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_ds.maths.estimators import Estimator, EstimatorSpec, probes, verdict
from zo_ds.maths.lr_rule import default_lr, lr_of_run, single_step_move

NORMALISED = [Estimator.FZOO, Estimator.FZOO_R, Estimator.ZO_SGD_SIGN]
PLAIN = [Estimator.MEZO, Estimator.ZO_SGD, Estimator.ZO_SGD_CONS]
WITHIN = 5.0
"""What a rule of one constant may be off by."""

Directions, Elements, Steps = st.integers(4, 512), st.integers(10**3, 10**12), st.integers(1, 10**6)


def spec_of(estimator: Estimator, directions: int = 8) -> EstimatorSpec:
    return EstimatorSpec(estimator, 1 if estimator is Estimator.ZO_SGD_CONS else directions)


@pytest.mark.parametrize("estimator", NORMALISED)
@given(Directions, Elements, Elements, Steps)
def test_a_normalised_step_goes_as_far_as_directions_elements_and_steps_say(
    estimator: Estimator, directions: int, trained: int, frozen: int, steps: int
) -> None:
    found = default_lr(spec_of(estimator, directions), trained, trained + frozen, steps)
    assert math.log(found) == pytest.approx(math.log(20 * directions) - (math.log(trained) + math.log(steps)) / 2)


@pytest.mark.parametrize("estimator", PLAIN)
@given(Directions, Elements, Elements, Steps)
def test_a_step_along_the_gradient_is_divided_by_its_norm(
    estimator: Estimator, directions: int, trained: int, frozen: int, steps: int
) -> None:
    spec, total = spec_of(estimator, directions), trained + frozen
    along = default_lr(EstimatorSpec(num_directions=8), trained, total, steps) * spec.num_directions / 8
    norm = 10 * math.sqrt(trained / total)  # a part of the weights has as much of the squared norm
    assert default_lr(spec, trained, total, steps) == pytest.approx(along / norm)


@pytest.mark.parametrize("estimator", Estimator)
@given(Directions, Elements, Steps)
def test_scaling_laws(estimator: Estimator, directions: int, trained: int, steps: int) -> None:
    lr = default_lr(spec_of(estimator, directions), trained, trained, steps)
    assert 0 < lr < math.inf
    assert default_lr(spec_of(estimator, directions), trained, trained, 4 * steps) == pytest.approx(lr / 2)
    assert default_lr(spec_of(estimator, directions), 4 * trained, 4 * trained, steps) == pytest.approx(lr / 2)
    if estimator is not Estimator.ZO_SGD_CONS:
        assert default_lr(spec_of(estimator, 2 * directions), trained, trained, steps) == pytest.approx(2 * lr)
    # A quarter of the same model: a normalised step gets longer, and without division by the norm even more.
    part = default_lr(spec_of(estimator, directions), trained, 4 * trained, steps)
    whole = default_lr(spec_of(estimator, directions), 4 * trained, 4 * trained, steps)
    assert part == pytest.approx(whole * (2 if estimator in NORMALISED else 4))


def test_no_steps_are_taken_for_one() -> None:
    assert default_lr(EstimatorSpec(), 1000, 1000, 0) == default_lr(EstimatorSpec(), 1000, 1000, 1)
    assert lr_of_run(0.1, 0) == lr_of_run(0.1, 1) == 0.1


@given(st.floats(1e-9, 1e3), Steps)
def test_a_run_takes_its_best_single_step_over_the_root_of_its_length(best: float, steps: int) -> None:
    lr = lr_of_run(best, steps)
    assert lr <= best
    assert lr == pytest.approx(best if steps <= 2 else 1.6 * best / math.sqrt(steps))
    assert lr_of_run(best, steps + 1) <= lr


@pytest.mark.parametrize("estimator", NORMALISED)
@pytest.mark.parametrize("directions", [4, 64, 1024])
def test_normalised_steps_are_as_long_as_the_rule_takes_them_for(estimator: Estimator, directions: int) -> None:
    """Root mean square over the elements: signs and normals are independent, so squares of coefficients add up."""
    spec, squares = spec_of(estimator, directions), []
    for seed in range(200):
        losses = torch.randn(len(probes(spec)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        losses[0] *= 0 if spec.evaluates_theta else 1  # the mean of the others
        squares.append(float(verdict(losses, spec, 1.0, 1e-3).coefficients.double().square().sum()))
    move = math.sqrt(sum(squares) / len(squares))
    assert move == pytest.approx(1 / math.sqrt(directions), rel=0.25)
    wanted = single_step_move(directions, 10**6)
    assert default_lr(spec, 10**6, 10**6, 1) * move == pytest.approx(wanted, rel=0.25)


FZOO_125M = (Estimator.FZOO, 8, 125_239_296, 125_239_296, 4444)
LORA_13B = 2 * 40 * 2 * 8 * 5120
"""Two matrices of rank 8 for the queries and the values of 40 layers of width 5120."""
ANCHORS = {
    # arXiv 2506.09034, Table 14: OPT-125M on SST-2, N = 8; 1e-4 and 2e-4 end at 0.844 and 0.852, 5e-4 at 0.763
    "fzoo-opt-125m-low": (*FZOO_125M, 5e-5),
    "fzoo-opt-125m": (*FZOO_125M, 1e-4),
    "fzoo-opt-125m-best": (*FZOO_125M, 2e-4),
    "fzoo-opt-125m-high": (*FZOO_125M, 5e-4),
    # arXiv 2305.17333, the grids of its appendix: N = 1
    "mezo-opt-13b": (Estimator.MEZO, 1, 12_853_473_280, 12_853_473_280, 20_000, 1e-7),
    "mezo-opt-13b-lora": (Estimator.MEZO, 1, LORA_13B, 12_853_473_280 + LORA_13B, 20_000, 1e-4),
    "mezo-opt-13b-lora-low": (Estimator.MEZO, 1, LORA_13B, 12_853_473_280 + LORA_13B, 20_000, 5e-5),
    "mezo-roberta-large": (Estimator.MEZO, 1, 355_359_744, 355_359_744, 100_000, 1e-6),
    # The example of FZOO's repository, WSC: 40,000 forwards
    "fzoo-opt-13b": (Estimator.FZOO, 8, 12_853_473_280, 12_853_473_280, 4444, 5e-5),
    # Tried here on SmolLM2-135M, film reviews: 4e-3 is the best of six after 20 steps, 2e-3 and 4e-3 are after 40
    "fzoo-smollm2-20": (Estimator.FZOO, 8, 134_515_008, 134_515_008, 20, 4e-3),
    "fzoo-smollm2-40": (Estimator.FZOO, 8, 134_515_008, 134_515_008, 40, 4e-3),
    "mezo-smollm2": (Estimator.MEZO, 1, 134_515_008, 134_515_008, 180, 3e-5),
}


@pytest.mark.parametrize(
    ("estimator", "directions", "trained", "total", "steps", "published"), ANCHORS.values(), ids=ANCHORS.keys()
)
def test_published_rates(
    estimator: Estimator, directions: int, trained: int, total: int, steps: int, published: float
) -> None:
    found = default_lr(EstimatorSpec(estimator, directions), trained, total, steps)
    assert published / WITHIN < found < published * WITHIN
