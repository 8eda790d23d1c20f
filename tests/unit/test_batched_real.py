"""The batched forward on the default model and its own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.unit.families import Pair, fzoo, pair
from zo_ds.config.load import load_config
from zo_ds.forward.displacement import Place
from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.estimators import Estimator, EstimatorSpec, probes, verdict
from zo_ds.parallel.channel import SoloChannel
from zo_ds.parallel.grid import Grid
from zo_ds.stores.resident import fill_in_place
from zo_ds.tasks.batch import Batch
from zo_ds.tasks.scorer import Scorer
from zo_ds.trainer.job import check, encode_units, load, make_sampler

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

N = 8
SPEC = EstimatorSpec(Estimator.FZOO, N)
RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


class Real(NamedTuple):
    model: nn.Module
    scorer: Scorer
    batch: Batch
    padded: Batch


@pytest.fixture(scope="module")
def real() -> Real:
    config, channel = load_config(RECIPE, ["data.test_examples=8", "data.dev_examples=8"]), SoloChannel()
    plan = check(config, channel)
    loaded, asking = load(plan)
    scorer = asking.learner
    fill_in_place(loaded.module, loaded.source)
    indices = make_sampler(config, plan.task, plan.splits, scorer).indices(0)
    # Sentences of several lengths, so that packing has something to do.
    examples = [*[plan.splits.train[index] for index in indices[:4]], *plan.splits.train[:4]]
    (padded,) = encode_units(examples, 8, scorer, Grid(0, 1, 1), torch.device("cpu"))

    def call(function: Any, batch: Batch) -> Tensor:
        with torch.inference_mode():
            found: Tensor = function(loaded.module, batch)
        return found

    scorer.settle(loaded.module, call, plan.splits.train[:4], torch.device("cpu"))
    (batch,) = encode_units(examples, 8, scorer, Grid(0, 1, 1), torch.device("cpu"))
    return Real(loaded.module, scorer, batch, padded)


def places(eps: float = 1e-3) -> list[Place]:
    return fzoo(N, eps)


def means(found: Pair, batch: Batch) -> Tensor:
    return found.batched.losses(batch, places()).mean(1)


def coefficients(losses: Tensor) -> Tensor:
    assert [probe.side for probe in probes(SPEC)] == [0] + [1] * N
    return verdict(losses, SPEC, 1e-3, 1e-3).coefficients.double()


@pytest.mark.parametrize("structure", list(NoiseStructure), ids=lambda s: s.value)
def test_losses_and_estimates_are_those_of_the_sequential_evaluator(real: Real, structure: NoiseStructure) -> None:
    found = pair(real.model, real.scorer.loss, structure)
    batched, alone = means(found, real.batch), found.sequential.losses(real.padded, places()).mean(1)
    assert float(((batched - alone) / alone).abs().max()) < 1e-5
    # The directions are as good as orthogonal, so that the cosine of the estimates is that of the differences.
    ours, theirs = batched[1:] - batched[0], alone[1:] - alone[0]
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.9999


def test_neither_passes_nor_packing_change_coefficients(real: Real) -> None:
    wanted = coefficients(means(pair(real.model, real.scorer.loss), real.batch))
    for replicas in (1, 2, 5):
        other = coefficients(means(pair(real.model, real.scorer.loss, replicas=replicas), real.batch))
        assert float((other - wanted).abs().max() / wanted.abs().max()) < 1e-4
    padded = coefficients(means(pair(real.model, real.scorer.loss), real.padded))
    assert float((padded - wanted).abs().max() / wanted.abs().max()) < 5e-4


def test_strict_mode_has_fixed_bits(real: Real) -> None:
    sizes: list[dict[str, int]] = [{}, {"replicas": 1}, {"replicas": 9}, {"budget_bytes": 1}]
    runs = [pair(real.model, real.scorer.loss, strict=True, **size) for size in sizes]
    losses = [run.batched.losses(real.batch, places()) for run in runs]
    assert all(torch.equal(other, losses[0]) for other in losses[1:])
