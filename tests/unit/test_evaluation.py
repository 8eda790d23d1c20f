"""Scores of held-out examples: against a plain loop, for any batch size and number of ranks; which of two is better."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import on_ranks
from tests.launch import jobs
from tests.unit.asking import causal, classification, read, word_tokens
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.errors import CorruptRunError
from zo_ds.evaluation.evaluate import Evaluation, evaluate
from zo_ds.parallel.channel import Channel, SoloChannel
from zo_ds.tasks.generation import GenerationJudge
from zo_ds.tasks.likelihood import TextLikelihood
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.registry import resolve_task
from zo_ds.tasks.scorer import Scorer
from zo_ds.trainer.state import RunState

COUNT = 19
TEXTS = [" ".join(jobs.WORDS[(n * 5 + k) % len(jobs.WORDS)] for k in range(n % 6 + 1)) for n in range(COUNT)]
OWN = classification("{text} It was", ("bad", "good"))
TEXT, SQUAD = (resolve_task(TaskConfig(name=name)) for name in ("text", "squad"))
SHORT = replace(SQUAD, max_new_tokens=3)
EXAMPLES = read(OWN, *({"text": text, "label": number % 2} for number, text in enumerate(TEXTS)))
DOCUMENTS = read(TEXT, *({"text": text} for text in TEXTS))
QUESTIONS = read(
    SQUAD,
    *(
        {"title": "film", "context": text, "question": "is", "answers": {"text": [jobs.WORDS[n]]}}
        for n, text in enumerate(TEXTS)
    ),
)
Subject = tuple[nn.Module, Scorer, list[Example]]


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    words = word_tokens()
    model = causal("llama", len(words), 32)
    return {
        "accuracy": (model, OptionLikelihood(OWN, words, 32), EXAMPLES),
        "loss": (model, TextLikelihood(TEXT, words, 32), DOCUMENTS),
        "f1": (model, GenerationJudge(SHORT, words, 32), QUESTIONS),
    }


@pytest.fixture(params=["accuracy", "loss", "f1"])
def subject(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> Subject:
    return subjects[request.param]


def run(subject: Subject, batch_size: int, channel: Channel, count: int = COUNT, **how: Any) -> Evaluation:
    model, scorer = copy.deepcopy(subject[0]), copy.deepcopy(subject[1])  # ranks are threads here

    @torch.no_grad()
    def score(function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(model, batch)

    return evaluate(score, scorer, subject[2][:count], batch_size, channel, **how)


def test_it_is_what_a_plain_loop_finds(subjects: dict[str, Subject]) -> None:
    model, scorer, _ = subjects["accuracy"]
    right, losses = [], []
    for example in EXAMPLES:
        with torch.no_grad():
            scores = scorer.scores(model, scorer.encode([example]))[0].double()
        right.append(int(scores.argmax()) == example.label)
        losses.append(float(scores.logsumexp(0) - scores[example.label]))
    found = run(subjects["accuracy"], 4, SoloChannel())
    assert (found.metric, found.examples) == ("accuracy", COUNT)
    assert found.score == found.values["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-12)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    # Neither all right nor all wrong, so that an example in the wrong place would show.
    assert 0 < found.score < 1
    assert max(losses) - min(losses) > 0.1


def test_every_column_is_a_mean_over_the_examples(subject: Subject) -> None:
    model, scorer, examples = subject
    rows = []
    for example in examples:
        with torch.no_grad():
            rows.append(scorer.grade(model, scorer.encode([example]))[0])
    found = run(subject, 4, SoloChannel())
    means = torch.stack(rows).mean(0).tolist()
    assert list(found.values) == list(scorer.columns)
    assert found.metric == scorer.columns[0]
    assert list(found.values.values()) == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 19, 50])
def test_batches_do_not_matter(subject: Subject, batch_size: int) -> None:
    reference, found = run(subject, 4, SoloChannel()), run(subject, batch_size, SoloChannel())
    assert found.values == pytest.approx(reference.values, abs=1e-5)
    assert found.metric == "loss" or found.score == reference.score


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 19])
def test_ranks_do_not_matter(subject: Subject, ranks: int, count: int) -> None:
    """Bit for bit, and also where a rank has nothing to do."""
    alone = run(subject, 4, SoloChannel(), count)
    assert on_ranks(ranks, lambda channel: run(subject, 4, channel, count)) == [alone] * ranks


def test_in_lockstep_every_rank_calls_as_often(subjects: dict[str, Subject]) -> None:
    alone = run(subjects["accuracy"], 4, SoloChannel())

    def counted(channel: Channel) -> tuple[Evaluation, int]:
        calls = 0
        model, scorer, examples = copy.deepcopy(subjects["accuracy"])

        @torch.no_grad()
        def score(function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return function(model, batch)

        return evaluate(score, scorer, examples, 4, channel, lockstep=True), calls

    # Five batches for three ranks.
    assert on_ranks(3, counted) == [(alone, 2)] * 3


# Which of two is better


def evaluation(metric: str, score: float, loss: float) -> Evaluation:
    return Evaluation(metric, {metric: score, "loss": loss}, 10)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "reward"])
@pytest.mark.parametrize("by", ["loss", "metric"])
def test_which_of_two_is_better(by: str, metric: str) -> None:
    base = evaluation(metric, 0.5, 1.0)
    assert base.better_than(None, by)
    assert not base.better_than(base, by)
    assert evaluation(metric, 0.6, 9.0).better_than(base, by) == (by == "metric")
    assert evaluation(metric, 0.4, 0.1).better_than(base, by) == (by == "loss")
    # The other number decides between equals.
    assert evaluation(metric, 0.5, 0.9).better_than(base, by)
    assert not evaluation(metric, 0.5, 1.1).better_than(base, by)
    assert evaluation(metric, 0.6, 1.0).better_than(base, by)
    assert not evaluation(metric, 0.4, 1.0).better_than(base, by)


@pytest.mark.parametrize("by", ["loss", "metric"])
def test_less_is_better_where_the_loss_is_the_metric(by: str) -> None:
    base, better, worse = (Evaluation("loss", {"loss": value}, 10) for value in (1.0, 0.5, 2.0))
    assert base.score == base.loss == 1.0
    assert better.better_than(base, by)
    assert not worse.better_than(base, by)
    assert not base.better_than(base, by)


@pytest.mark.parametrize("by", ["loss", "metric"])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_what_is_not_a_number_is_worse_than_anything(metric: str, by: str) -> None:
    good = Evaluation(metric, {"accuracy": 0.1, "loss": 100.0}, 10)
    for broken in ({"accuracy": math.nan, "loss": math.nan}, {"accuracy": 0.1, "loss": math.nan}):
        bad = Evaluation(metric, broken, 10)
        assert good.better_than(bad, by)
        assert not bad.better_than(good, by)
        assert not bad.better_than(bad, by)


def test_words_for_a_log() -> None:
    found = Evaluation("f1", {"f1": 0.25, "exact_match": 0.1, "loss": 1 / 3}, 12)
    assert str(found) == "f1 0.2500, exact match 0.1000, loss 0.3333 (12 examples)"


# What a run keeps of it


def test_a_runs_state_keeps_scores() -> None:
    scores = [evaluation("f1", 1 / 3, 0.1 + step) for step in range(3)]
    state = RunState("sha", scores[0], {8: scores[1], 20: scores[2]}, starts=3)
    tree = json.loads(state.to_json())
    assert tree["dev"]["8"] == {"metric": "f1", "values": {"f1": 1 / 3, "loss": 1.1}, "examples": 10}
    again = RunState.from_json(state.to_json(), "state.json")
    assert again == state
    assert again.dev[20].to_json() == tree["dev"]["20"]
    assert again.best("loss") == (8, scores[1])
    assert RunState.from_json(RunState("sha").to_json(), "state.json").zero_shot is None


@pytest.mark.parametrize(
    "score", [{"accuracy": 0.5, "loss": 1.0, "examples": 10}, {"metric": "f1", "values": {}}, 5, None]
)
def test_scores_of_another_version_are_refused(score: Any) -> None:
    tree = json.loads(RunState("sha").to_json()) | {"dev": {"8": score}}
    with pytest.raises(CorruptRunError, match="state cannot be read") as caught:
        RunState.from_json(json.dumps(tree), "run/state.json")
    assert caught.value.where == "run/state.json"
