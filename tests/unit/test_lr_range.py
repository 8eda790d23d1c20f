"""The range test finds the step that a quadratic has, looks only, and says the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_ds
from tests.conftest import STORES, on_ranks, tiny_model, zo_batch
from tests.unit.test_forward import AWKWARD, FUSED
from zo_ds.config.schema import ZerothOrderConfig
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.lr_range import LrRange, affordable, find_lr
from zo_ds.engine.measure import Measurement
from zo_ds.errors import ConfigError
from zo_ds.forward.batched import BatchedEvaluator
from zo_ds.forward.displacement import Displacement, Shift
from zo_ds.forward.evaluator import Batch, LossFunction
from zo_ds.forward.loss import model_loss
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.estimators import forwards
from zo_ds.maths.lr_rule import default_lr, lr_of_run
from zo_ds.maths.update import Term, Update
from zo_ds.ops.plan import Plan
from zo_ds.parallel.channel import Channel, SoloChannel
from zo_ds.parallel.grid import Grid
from zo_ds.parallel.layout import Kind, Layout
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = [
    Plan.of(7, [Update(0, (Term(0, 0, 0.01), Term(1, 2, -0.02), Term(1, 0, 0.005)))]),
    Plan.of(2**63, [Update(0, (Term(0, 1, -0.03),), decay=0.25), Update(5, (Term(4, 1, 0.02),))]),
]
"""Of terms from several steps, with decay, and of several updates."""
Structure = pytest.mark.parametrize("structure", list(NoiseStructure), ids=lambda s: s.value)
Evaluators = pytest.mark.parametrize("kind", ["sequential", "batched"])


class Held:
    """A model with a store and the evaluators that read from it."""

    def __init__(
        self,
        model: nn.Module,
        structure: NoiseStructure = NoiseStructure.DENSE,
        loss_fn: LossFunction = model_loss,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.infos = trainable_parameters(model.eval())
        self.store = ResidentStore(model, self.infos, structure)
        sequential = SequentialEvaluator(model, Perturber(model, self.infos, structure), loss_fn, autocast)
        self.evaluators = {"sequential": sequential, "batched": BatchedEvaluator(sequential)}

    def losses(self, kind: str, batch: Batch, places: Sequence[Any]) -> Tensor:
        return self.evaluators[kind].losses(batch, places)


def after_updates(made: Callable[[], Held], batch: Batch, plan: Plan) -> Tensor:
    """The losses of a model whose weights were really changed."""
    held = made()
    held.store.apply(plan)
    return held.losses("sequential", batch, [None])[0]


def check_shifts(made: Callable[[], Held], batch: Batch, kind: str) -> None:
    held = made()
    before = held.store.digest()
    pointers = [parameter.data_ptr() for parameter in held.infos]
    places = [Shift(PLANS[0]), None, Displacement(3, 0, 1e-2), Shift(PLANS[1]), Shift(PLANS[0])]
    if kind == "batched":
        held.losses(kind, batch, places[1:3])  # has learned and verified the model before
    found = held.losses(kind, batch, places)
    assert held.store.digest() == before
    assert [parameter.data_ptr() for parameter in held.infos] == pointers
    assert torch.equal(found[0], after_updates(made, batch, PLANS[0]))
    assert torch.equal(found[3], after_updates(made, batch, PLANS[1]))
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1:3], held.losses("sequential", batch, places[1:3]))
    assert len({float(row.sum()) for row in found}) == 4


# Places after updates that were not made


@Evaluators
@Structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_shift_is_the_update_itself(family: str, dtype: torch.dtype, structure: NoiseStructure, kind: str) -> None:
    """Embeddings, tied to the head in Llama; stochastic rounding of the same bits in bf16."""
    autocast = dtype if dtype is torch.bfloat16 else None
    check_shifts(lambda: Held(tiny_model(family, 0, dtype), structure, autocast=autocast), zo_batch(family), kind)


@pytest.mark.parametrize("name", sorted(set(AWKWARD) - FUSED))
def test_a_shift_reaches_parameters_wherever_they_are_used(name: str) -> None:
    def made() -> Held:
        torch.manual_seed(0)
        return Held(AWKWARD[name](), loss_fn=lambda m, x: m(x).flatten(1).mean(1))

    check_shifts(made, torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), "sequential")


@Evaluators
def test_a_shift_reaches_what_only_the_loss_function_reads(kind: str) -> None:
    """It is shown outside of torch's inference mode, on a copy of the shape of one that was made within."""

    def made() -> Held:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
        return Held(model, loss_fn=lambda m, x: (m["b"](x) @ m["a"].weight).square().mean(1))

    check_shifts(made, torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), kind)


# A quadratic


class Quadratic(nn.Module):
    """0.5 h |w|^2 + g w for every example, plus what comes with the example."""

    def __init__(self, slope: float, curvature: float, elements: int = 4096) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(elements, generator=generator)
        self.register_buffer("g", direction * (slope / direction.norm()))
        self.w = nn.Parameter(torch.zeros(elements))
        self.h = curvature

    def forward(self, x: Tensor) -> Tensor:
        value = 0.5 * self.h * self.w.double().square().sum() + self.g.double() @ self.w.double()
        return x.double() + value


class Counted(Quadratic):
    """Knows how often it ran."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Cliff(nn.Module):
    """Falls along its slope up to a length of the step, beyond it is nan or all alike; or it never falls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.w, self.kind = nn.Parameter(torch.zeros(4096)), kind
        self.register_buffer("g", torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 20)

    def forward(self, x: Tensor) -> Tensor:
        length, along = float(self.w.square().mean().sqrt()), float(self.g @ self.w)
        if self.kind == "tie":
            return x
        if self.kind == "rises":
            return x + abs(along)
        if length > 0.2:
            # A plateau far above, flat but for a little slope; or nothing at all.
            return x + (math.nan if self.kind == "nan" else 50.0 - 0.1 * length)
        return x + along


def units(number: int) -> tuple[Sequence[Batch], Batch | None]:
    return [torch.arange(4.0) + number, torch.arange(4.0) - 7 * number], None


def measured(model: nn.Module, steps: int = 1000, given: Any = units, **options: Any) -> LrRange:
    held = Held(model, loss_fn=lambda m, x: m(x))
    channel = SoloChannel()
    measurement = Measurement(held.evaluators["sequential"], channel, Grid(0, 1, 1), Layout(Kind.SOLO, 0, 1), 1)
    before = held.store.digest()
    found = find_lr(measurement, ZerothOrderConfig(**options), held.store.trained, steps, given)
    assert held.store.digest() == before
    return found


ESTIMATORS: dict[str, tuple[dict[str, Any], Callable[[int, float, float], float]]] = {
    # Options, and the best single step of N directions for a slope and the trace of the Hessian.
    "fzoo": ({}, lambda n, g, trace: n * g / trace),
    "fzoo-mean": ({"baseline": "mean"}, lambda n, g, trace: n * g / trace),
    "fzoo-momentum": ({"momentum": 0.9}, lambda n, g, trace: n * g / trace),
    "fzoo-gaussian": ({"noise": "gaussian"}, lambda n, g, trace: n * g / trace),
    "fzoo_r": ({"estimator": "fzoo_r", "num_directions": 4}, lambda n, g, trace: n * g / trace),
    "mezo": ({"estimator": "mezo"}, lambda n, g, trace: n / trace),
    "mezo-1": ({"estimator": "mezo", "num_directions": 1}, lambda n, g, trace: n / trace),
    "zo_sgd": ({"estimator": "zo_sgd", "num_directions": 3}, lambda n, g, trace: n / trace),
    "zo_sgd_cons": ({"estimator": "zo_sgd_cons", "num_directions": 1}, lambda n, g, trace: n / trace),
    # E|cos| of a random direction is sqrt(2 / pi) of its root mean square.
    "zo_sgd_sign": ({"estimator": "zo_sgd_sign"}, lambda n, g, trace: math.sqrt(2 / math.pi) * n * g / trace),
    "zo_sgd_sign-1": (
        {"estimator": "zo_sgd_sign", "num_directions": 1},
        lambda n, g, trace: math.sqrt(2 / math.pi) * n * g / trace,
    ),
}


@pytest.mark.parametrize(("options", "best"), ESTIMATORS.values(), ids=ESTIMATORS.keys())
@pytest.mark.parametrize("off", [0.1, 0.7, 1.0, 4.0, 20.0])
def test_the_best_single_step_of_a_quadratic(options: dict[str, Any], best: Any, off: float) -> None:
    """Wherever it lies from what the rule expects. The median, since eight directions see a gradient in part."""
    elements, curvature, directions = 4096, 1.0, options.get("num_directions", 8)
    slope = off * 20 / math.sqrt(elements) * curvature * elements
    wanted = best(directions, slope, curvature * elements)
    found = [measured(Quadratic(slope, curvature, elements), eps=1e-4, run_seed=seed, **options) for seed in range(5)]
    # A factor of 2 between trials, and the shortest that gives four fifths of the fall.
    assert wanted / 2 <= median(result.best_single for result in found) <= 1.3 * wanted
    for result in found:
        assert wanted / 4 <= result.best_single <= 2 * wanted
        assert result.lr == pytest.approx(result.best_single * 1.6 / math.sqrt(1000))
        assert min(loss for _, loss in result.trials) < result.loss


@pytest.mark.parametrize("beyond", ["nan", "plateau"])
def test_lengths_beyond_the_edge_are_no_help(beyond: str) -> None:
    """The rule expects steps that are 4 and 8 times too long: down from there, whatever the losses there do."""
    found = measured(Cliff(beyond), eps=1e-4)
    lrs, losses = zip(*found.trials, strict=True)
    assert list(lrs) == pytest.approx([lrs[0] * factor for factor in (1, 2, 0.5, 0.25, 0.125, 0.0625)][: len(lrs)])
    assert not losses[0] < found.loss
    assert losses[-1] > losses[-2]
    assert found.best_single == lrs[-2]
    assert found.trials[-2][1] == min(loss for loss in losses if math.isfinite(loss)) < found.loss
    tree = found.to_json()
    assert [loss for _, loss in tree["trials"]] == [loss if math.isfinite(loss) else None for loss in losses]


def test_it_goes_up_while_the_loss_falls_and_no_further() -> None:
    """A plane: there is no best step, and the trials end."""
    found = measured(Quadratic(100.0, 0.0), eps=1e-4)
    lrs, losses = zip(*found.trials, strict=True)
    assert list(lrs) == pytest.approx([lrs[0] * 2**k for k in range(7)])
    assert list(losses) == sorted(losses, reverse=True)
    assert found.best_single == lrs[-1]


def test_where_it_starts_is_what_the_rule_expects() -> None:
    """For normalised estimators the rule for a run of one step, whatever the gradient."""
    for slope in (1.0, 1e4):
        found = measured(Quadratic(slope, 0.0), eps=1e-4, num_directions=64)
        rule = default_lr(ZerothOrderConfig(num_directions=64).estimator_spec, 4096, 4096, 1)
        assert found.trials[0][0] == pytest.approx(rule, rel=0.25)


def test_a_step_is_tried_on_other_examples() -> None:
    """What lowers the loss of its own batch alone is worth nothing."""

    class OwnBatch(Quadratic):
        def forward(self, x: Tensor) -> Tensor:
            along = self.g.double() @ self.w.double()
            return x.double() + (along if float(x[0]) == 0 else -along)

    with pytest.raises(ConfigError, match="no learning rate"):
        measured(OwnBatch(20.0, 0.0), eps=1e-4)


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (lambda: Cliff("tie"), {}, "no estimate has a direction"),
        (lambda: Cliff("tie"), {"estimator": "mezo"}, "no estimate has a direction"),
        (lambda: Cliff("rises"), {}, "after the best step"),
        (lambda: Quadratic(math.nan, 1.0), {}, "not finite"),
        (lambda: Quadratic(math.inf, 1.0), {"estimator": "mezo", "num_directions": 1}, "not finite"),
    ],
    ids=["ties", "ties-mezo", "rises", "nan", "inf"],
)
def test_hopeless_cases_say_what_to_do(model: Callable[[], nn.Module], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measured(model(), **options)
    assert why in str(caught.value)
    assert "zeroth_order.lr" in (caught.value.remedy or "")
    assert "rule" in (caught.value.remedy or "")


def test_one_batch_that_is_not_finite_is_left_out() -> None:
    """Two estimates of four directions: the one that can be used has half of them."""

    class Once(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (math.nan if self.calls == 3 else 1.0)

    found = measured(Once(2000.0, 1.0), eps=1e-4, num_directions=4)
    assert 4 * 2000 / 4096 / 4 <= found.best_single <= 2 * 4 * 2000 / 4096


# What it costs


@pytest.mark.parametrize(("options", "best"), ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_it_costs_a_twentieth_at_most_where_it_is_affordable(options: dict[str, Any], best: Any) -> None:
    config = ZerothOrderConfig(eps=1e-4, **options)
    least = next(steps for steps in range(1, 10**4) if affordable(config, steps))
    assert affordable(config, least + 1)
    assert affordable(config, 10 * least)
    per_step = forwards(config.estimator_spec)
    for off in (1 / 30, 1.0, 60.0):  # a short search, and both long ones
        slope = off * 20 * math.sqrt(4096)
        model = Counted(slope, 1.0)
        found = measured(model, least, eps=1e-4, **options)
        # Two micro-batches each. One more looks at how the model uses its parameters, as the first of any run does.
        assert 2 * found.forwards == model.calls - 1
        assert found.forwards <= 0.05 * least * per_step


@pytest.mark.parametrize(
    ("directions", "estimator", "least"), [(8, "fzoo", 38), (64, "fzoo", 23), (1, "mezo", 240), (8, "mezo", 30)]
)
def test_how_long_a_run_must_be(directions: int, estimator: str, least: int) -> None:
    """20 (estimates + 8 trials / forwards of a step) steps."""
    config = ZerothOrderConfig(estimator=estimator, num_directions=directions)
    assert affordable(config, least)
    assert not affordable(config, least - 1)


# Through an engine


def open_engine(
    store: str = "resident",
    channel: Channel | None = None,
    population: int = 1,
    model: nn.Module | None = None,
    **options: Any,
) -> ZOEngine:
    config = {
        "zero_optimization": STORES[store],
        "zeroth_order": {"num_directions": 4, "run_seed": 3, "total_steps": 400, "lr": "auto", **options},
    }
    parallel, model = {"population": population}, model or tiny_model("llama")
    return zo_ds.initialize(model, config, channel=channel or SoloChannel(), parallel=parallel)


def mine(engine: ZOEngine) -> Any:
    """Two micro-batches, the same ones for estimate and trials: random labels teach nothing about others."""
    everything = [zo_batch(seed=0), zo_batch(seed=1)]
    return lambda number: ([everything[unit] for unit in engine.grid.units(2)], None)


def test_an_engine_measures_and_uses_it_whatever_holds_the_weights() -> None:
    found = {}
    for store in STORES:
        engine = open_engine(store)
        before, rule = engine.digest(), engine.found_lr
        assert rule == {"value": engine.config.lr, "how": "rule"}
        found[store] = engine.measure_lr(mine(engine))
        assert engine.digest() == before
        assert engine.steps_done == 0
        assert engine.config.lr == found[store].lr == lr_of_run(found[store].best_single, 400)
        assert engine.found_lr == found[store].to_json()
        assert engine.step(mine(engine)(0)[0]).lr == found[store].lr
    assert found["zero3"] == found["zero3-cpu"] == found["resident"]


def test_a_run_of_unknown_length_is_no_single_step() -> None:
    """Neither by the rule nor by measuring: both take it for a thousand steps."""
    known, unknown = open_engine(total_steps=1000), open_engine(total_steps=None)
    assert known.config.lr == unknown.config.lr
    assert known.measure_lr(mine(known)) == unknown.measure_lr(mine(unknown))


@pytest.mark.parametrize("population", [1, 2])
@pytest.mark.parametrize("options", [{"strict": True}, {"forward": "sequential"}], ids=["strict", "sequential"])
def test_ranks_find_what_one_finds(population: int, options: dict[str, Any]) -> None:
    """Also where there are fewer trials at a time than ranks to share them."""
    alone = open_engine(**options)
    wanted = alone.measure_lr(mine(alone))
    models = [tiny_model("llama") for _ in range(2)]

    def work(channel: Channel) -> tuple[LrRange, float]:
        engine = open_engine("resident", channel, population, models[channel.rank], **options)
        found = engine.measure_lr(mine(engine))
        return found, engine.step(mine(engine)(0)[0]).clean_loss

    results = on_ranks(2, work)
    assert results == [(wanted, alone.step(mine(alone)(0)[0]).clean_loss)] * 2
