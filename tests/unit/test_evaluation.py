"""Accuracy and loss of held-out examples: against a plain loop, for any batch size and number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import on_ranks
from tests.launch import jobs
from zo_ds.data.examples import Example
from zo_ds.evaluation.accuracy import Evaluation, evaluate
from zo_ds.parallel.channel import Channel, SoloChannel
from zo_ds.tasks.registry import Task
from zo_ds.tasks.scoring import Batch, OptionLikelihood, Scorer

EXAMPLES = [
    Example(" ".join(jobs.WORDS[(number * 5 + k) % len(jobs.WORDS)] for k in range(number % 6 + 1)), number % 2)
    for number in range(19)
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Scorer]:
    folder = jobs.make_model(tmp_path_factory.mktemp("model"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    task = Task("{text} It was", ("bad", "good"))
    return model, OptionLikelihood(task, AutoTokenizer.from_pretrained(folder), 32)


def run(subject: tuple[nn.Module, Scorer], batch_size: int, channel: Channel, count: int = 19) -> Evaluation:
    model, scorer = copy.deepcopy(subject[0]), subject[1]  # ranks are threads here

    @torch.no_grad()
    def score(function: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
        return function(model, batch)

    return evaluate(score, scorer, EXAMPLES[:count], batch_size, channel)


def test_it_is_what_a_plain_loop_finds(subject: tuple[nn.Module, Scorer]) -> None:
    model, scorer = subject
    right, losses = [], []
    for example in EXAMPLES:
        with torch.no_grad():
            scores = scorer.scores(model, scorer.encode([example]))[0].double()
        right.append(int(scores.argmax()) == example.label)
        losses.append(float(scores.logsumexp(0) - scores[example.label]))
    found = run(subject, 4, SoloChannel())
    assert found.examples == len(EXAMPLES)
    assert found.accuracy == pytest.approx(sum(right) / len(right), abs=1e-12)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    # Neither all right nor all wrong, so that an example in the wrong place would show.
    assert 0 < found.accuracy < 1
    assert max(losses) - min(losses) > 0.1


@pytest.mark.parametrize("batch_size", [1, 3, 7, 19, 50])
def test_batches_do_not_matter(subject: tuple[nn.Module, Scorer], batch_size: int) -> None:
    reference, found = run(subject, 4, SoloChannel()), run(subject, batch_size, SoloChannel())
    assert found.accuracy == reference.accuracy
    assert found.loss == pytest.approx(reference.loss, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 19])
def test_ranks_do_not_matter(subject: tuple[nn.Module, Scorer], ranks: int, count: int) -> None:
    """Bit for bit, and also where a rank has nothing to do."""
    alone = run(subject, 4, SoloChannel(), count)
    assert on_ranks(ranks, lambda channel: run(subject, 4, channel, count)) == [alone] * ranks


@pytest.mark.parametrize("by", ["loss", "accuracy"])
def test_which_of_two_is_better(by: str) -> None:
    base = Evaluation(0.5, 1.0, 10)
    assert base.better_than(None, by)
    assert not base.better_than(base, by)
    assert replace(base, accuracy=0.6, loss=9.0).better_than(base, by) == (by == "accuracy")
    assert replace(base, accuracy=0.4, loss=0.1).better_than(base, by) == (by == "loss")
    # The other number decides between equals.
    assert replace(base, loss=0.9).better_than(base, by)
    assert not replace(base, loss=1.1).better_than(base, by)
    assert replace(base, accuracy=0.6).better_than(base, by)
    assert not replace(base, accuracy=0.4).better_than(base, by)
