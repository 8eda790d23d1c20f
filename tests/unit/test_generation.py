"""Answers that a model writes: texts, scores, and losses at many places that come from one batched decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_ds
from tests.conftest import on_ranks, weights_of
from tests.unit.asking import byte_pairs, causal, log_likelihood, no_gradients, read, word_tokens
from tests.unit.families import Pair, fzoo, mezo, pair
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.engine.engine import ZOEngine
from zo_ds.errors import DataError, NonFiniteError
from zo_ds.forward.rowwise import RowWise
from zo_ds.maths.estimators import SkipReason
from zo_ds.parallel.channel import Channel, SoloChannel
from zo_ds.tasks.decoding import greedy
from zo_ds.tasks.generation import GenerationJudge, Generator
from zo_ds.tasks.registry import resolve_task
from zo_ds.tasks.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "gpt2", "opt")
NEW, LIMIT, EPS = 5, 64, 0.1
PASSAGES = ["the film", "a dull plot is not very bright", "cast", "good text , bad text ."]


def squad(**settings: Any) -> Task:
    return resolve_task(TaskConfig(name="squad", objective="f1", **{"max_new_tokens": NEW, **settings}))


def questions(answers: Sequence[Sequence[str]]) -> list[Example]:
    rows = [
        {"title": "film", "context": passage, "question": "is it good", "answers": {"text": list(accepted)}}
        for passage, accepted in zip(PASSAGES, answers, strict=True)
    ]
    return read(squad(), *rows)


NOBODY_KNOWS = questions([["unheard"]] * 4)


def worth(prompt: str, text: str, answers: Sequence[str]) -> float:
    """Another number for every text."""
    return sum((place + 1) * ord(letter) for place, letter in enumerate(text)) / 1000


def model_of(family: str = "llama") -> nn.Module:
    return causal(family, len(word_tokens()), LIMIT)


def generator(reward: Callable[..., Any] | None = worth) -> Generator:
    return Generator(squad(), word_tokens(), LIMIT, reward)


def plain_text(model: nn.Module, example: Example) -> str:
    """One row without padding or cache, up to the end that the tokenizer knows."""
    ids, said = word_tokens()(example.prompt)["input_ids"], list[int]()
    while len(said) < NEW and said[-1:] != [word_tokens().eos_token_id]:
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return str(word_tokens().decode(said, skip_special_tokens=True)).strip()


# Texts and scores


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_a_plain_loop_in_any_company(family: str) -> None:
    model, asked = model_of(family), generator()
    expected = [plain_text(model, example) for example in NOBODY_KNOWS]
    assert len(set(expected)) > 1

    def texts(examples: Sequence[Example]) -> list[str]:
        with torch.inference_mode():
            return asked.texts(model, asked.encode(examples))

    assert texts(NOBODY_KNOWS) == expected
    assert texts(NOBODY_KNOWS[::-1]) == expected[::-1]
    assert [texts([example])[0] for example in NOBODY_KNOWS] == expected


def test_only_the_first_line_counts() -> None:
    class Says(nn.Module):
        """Writes the same tokens to every prompt."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.ids, self.at = byte_pairs()(text, add_special_tokens=False)["input_ids"], 0

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, len(byte_pairs()))
            logits[:, -1, self.ids[self.at]] = 1
            self.at += 1
            return type("Output", (), {"logits": logits})

    asked = Generator(squad(max_new_tokens=20), byte_pairs(), 200)
    batch = asked.encode(NOBODY_KNOWS[:2])
    model = Says(" very good\nQuestion: x")
    assert asked.texts(model, batch) == ["very good"] * 2
    assert model.at == len(byte_pairs()(" very good\n", add_special_tokens=False)["input_ids"])
    assert asked.texts(Says("\ngood"), batch) == [""] * 2
    assert asked.texts(Says(" bad</s>"), batch) == ["bad"] * 2


def test_f1_and_exact_match() -> None:
    model = model_of()
    said = [plain_text(model, example) for example in NOBODY_KNOWS]
    # The words as they were said, all but the last, others, and the right ones behind wrong ones.
    shorter = " ".join(said[1].split()[:-1])
    examples = questions([[said[0]], [shorter], ["unheard"], ["unheard of", said[3]]])
    words, shared = len(said[1].split()), len(said[1].split()) - 1
    expected = torch.tensor([1.0, 2 * shared / (words + shared), 0.0, 1.0], dtype=torch.float64)
    asked = generator(None)
    call, batch = no_gradients(model), asked.encode(examples)
    torch.testing.assert_close(call(asked.scores, batch).squeeze(1).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(call(asked.loss, batch).double(), 1 - expected, rtol=1e-6, atol=1e-7)
    exact = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(call(asked.grade, batch), torch.stack([expected, exact, 1 - expected], dim=1))
    assert asked.columns == ("f1", "exact_match", "loss")


@pytest.mark.parametrize("rewarded", [False, True])
def test_the_judge_reports_the_likelihood_of_the_answer_as_the_loss(rewarded: bool) -> None:
    model, examples = model_of(), questions([["good text"], ["bad"], ["the cast"], ["a"]])
    reward = worth if rewarded else None
    judge, plain = GenerationJudge(squad(), word_tokens(), LIMIT, reward), generator(reward)
    call = no_gradients(model)
    found = call(judge.grade, judge.encode(examples).to(torch.device("cpu")))
    losses = []
    for example in examples:
        answer = word_tokens()(example.options[0], add_special_tokens=False)["input_ids"]
        prompt = word_tokens()(example.prompt)["input_ids"]
        losses.append(-log_likelihood(model, prompt, answer) / len(answer))
    torch.testing.assert_close(found[:, -1], torch.stack(losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :-1], call(plain.grade, plain.encode(examples))[:, :-1])
    assert judge.columns == (("reward", "loss") if rewarded else ("f1", "exact_match", "loss"))


def test_in_lockstep_a_batch_takes_as_many_calls_whatever_is_said() -> None:
    """Ranks of a shard group have other batches, and need each other's shards in every call."""
    model, judge = model_of(), GenerationJudge(squad(), word_tokens(), LIMIT)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    free = questions([["good text"]] * 4)
    with torch.inference_mode():
        said = [int(ids[0]) for ids in greedy(model, judge.encode(free).first, 1, [])]
    judge._stops = said

    def graded(lockstep: bool) -> tuple[int, Tensor]:
        judge.settle(model, no_gradients(model), free, torch.device("cpu"), lockstep=lockstep)
        calls.clear()
        found = no_gradients(model)(judge.grade, judge.encode(free))
        return len(calls), found

    (few, scores), (all_of_them, same) = graded(lockstep=False), graded(lockstep=True)
    hook.remove()
    assert (few, all_of_them) == (2, NEW + 1)
    torch.testing.assert_close(same, scores)


def test_answers_have_room_behind_a_cut_prompt() -> None:
    (example,) = questions([["a"]] * 4)[:1]
    long = Example("good " * 100, before=example.before, after=example.after, answers=("a",))
    asked = generator()
    assert asked.encode([long]).input_ids.shape == (1, LIMIT - NEW)
    assert asked.length(long) == LIMIT - NEW
    assert asked.prompts.truncated == 1


def test_a_prompt_without_tokens_begins_with_one_that_models_know() -> None:
    batch = generator().encode([Example(""), Example("good film")])
    assert batch.input_ids.tolist()[0] == [0, word_tokens().eos_token_id]
    assert batch.attention_mask.tolist() == [[0, 1], [1, 1]]


# The user's own judge


@pytest.mark.parametrize(
    ("reward", "mention"),
    [
        (lambda prompt, text, answers: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda prompt, text, answers: None, "TypeError"),
        (lambda prompt, text, answers: "much", "ValueError"),
        (lambda prompt, text: 1.0, "TypeError"),
        (lambda prompt, text, answers: float("nan"), "returned nan"),
        (lambda prompt, text, answers: float("inf"), "returned inf"),
    ],
)
def test_a_reward_that_fails_names_the_row(reward: Callable[..., Any], mention: str) -> None:
    asked = generator(reward)
    with pytest.raises(DataError) as caught:
        no_gradients(model_of())(asked.loss, asked.encode(NOBODY_KNOWS[2:]))
    assert mention in caught.value.what
    assert caught.value.where == "rows.jsonl:3"
    assert "the generated text was '" in caught.value.why


def test_what_a_reward_is_told() -> None:
    told = []

    def listen(prompt: str, text: str, answers: Sequence[str]) -> int:
        told.append((prompt, text, tuple(answers)))
        return len(told)

    model, asked, examples = model_of(), generator(listen), questions([["a"], ["b", "c"], ["d"], ["e"]])
    losses = no_gradients(model)(asked.loss, asked.encode(examples))
    assert told == [(e.prompt, plain_text(model, e), e.answers) for e in examples]
    assert losses.tolist() == [-1, -2, -3, -4]


# Many places at once


def counted(found: Pair, batch: Any, places: Any) -> tuple[Tensor, int, Tensor, int]:
    """Losses by both evaluators, and how often each of them called the model."""
    calls = [0]
    hook = found.model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    try:
        batched = found.batched.losses(batch, places)
        made, calls[0] = calls[0], 0
        sequential = found.sequential.losses(batch, places)
    finally:
        hook.remove()
    return batched, made, sequential, calls[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [{}, {"replicas": 2}, {"replicas": 1}, {"strict": True}], ids=str)
def test_generation_at_many_places_is_batched(family: str, size: dict[str, Any]) -> None:
    asked = generator()
    found = pair(model_of(family), RowWise(asked.loss), **size)
    batch, places = asked.encode(NOBODY_KNOWS), fzoo(4, EPS)
    first = found.batched.losses(batch, places)
    batched, made, sequential, alone = counted(found, batch, places)
    assert torch.equal(first, sequential)
    assert torch.equal(batched, sequential)
    assert len({tuple(row) for row in sequential.tolist()}) == len(places)
    passes = {"{}": 1, "{'replicas': 2}": 3, "{'replicas': 1}": 5, "{'strict': True}": 2}[str(size)]
    # Rows end early in few of them: a pass takes as many calls as its longest row.
    assert made <= passes * NEW
    assert alone > (len(places) - 1) * (NEW - 1)


def test_other_batches_and_places_of_the_same_evaluator() -> None:
    asked = generator()
    found = pair(model_of("opt"), RowWise(asked.loss))
    for examples, places in (
        (NOBODY_KNOWS, fzoo(4, EPS)),
        (NOBODY_KNOWS[1:2], fzoo(2, EPS, seed=8)),
        (NOBODY_KNOWS[:3], mezo(2, EPS)),
        (NOBODY_KNOWS, [*fzoo(2, EPS), *fzoo(2, EPS, seed=9)]),
        (NOBODY_KNOWS, [None]),
    ):
        batch = asked.encode(examples)
        assert torch.equal(found.batched.losses(batch, places), found.sequential.losses(batch, places))


class Scaled(nn.Module):
    """A model whose own code reads a weight: nothing in it is known to keep places apart."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(len(word_tokens())))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        found = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        found.logits = found.logits * self.scale
        return found


class Turned(nn.Module):
    """Texts of odd length give the last layer the tokens as its first axis, or are refused for several places."""

    def __init__(self, *, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.table, self.last = nn.Embedding(len(word_tokens()), 16), nn.Linear(16, len(word_tokens()))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.table(input_ids).cumsum(1)
        turned = input_ids.shape[1] % 2 == 1
        if turned and self.refuses and len(input_ids) > 2:
            raise RuntimeError("two rows are all that fit")
        logits = self.last(hidden.transpose(0, 1)).transpose(0, 1) if turned else self.last(hidden)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("kind", ["reads a weight", "loses the axis", "fails"])
def test_models_that_cannot_be_joined_run_one_place_at_a_time(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    asked = generator()
    model = Scaled(model_of()) if kind == "reads a weight" else Turned(refuses=kind == "fails")
    found, places = pair(model, RowWise(asked.loss)), fzoo(4, EPS)
    batch = asked.encode([Example("good film is bad"), Example("a the , .")])
    with caplog.at_level("WARNING", "zo_ds"):
        first = found.batched.losses(batch, places)
    assert "runs one direction at a time" in caplog.text
    batched, made, sequential, alone = counted(found, batch, places)
    assert made == alone
    assert torch.equal(first, sequential)
    assert torch.equal(batched, sequential)


# Steps


def open_engine(loss: Any, channel: Channel | None = None, **settings: Any) -> ZOEngine:
    options = {"num_directions": 4, "lr": 1e-2, "eps": EPS, "run_seed": 3, "max_consecutive_skips": 3, **settings}
    return zo_ds.initialize(
        copy.deepcopy(model_of()), {"zeroth_order": options}, loss_fn=RowWise(loss), channel=channel or SoloChannel()
    )


def test_answers_that_are_all_wrong_skip_steps_and_end_the_run_with_advice() -> None:
    asked = generator(None)
    engine = open_engine(asked.loss)
    before = {name: weight.clone() for name, weight in weights_of(engine).items()}
    batch = [asked.encode(NOBODY_KNOWS)]
    for _ in range(2):
        out = engine.step(batch)
        assert (out.skip, out.clean_loss, out.spread) == (SkipReason.ZERO_SPREAD, 1.0, 0.0)
    with pytest.raises(NonFiniteError) as caught:
        engine.step(batch)
    assert "zero_spread: losses between 1 and 1" in caught.value.why
    assert "an objective that moves" in caught.value.remedy
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())


@pytest.mark.parametrize("forward", ["batched", "sequential"])
def test_ranks_take_the_same_step(forward: str) -> None:
    """Each has its own tokenizer's worth of work; the step is that of one process."""

    def step(channel: Channel) -> tuple[str, list[float]]:
        asked = generator()
        engine = open_engine(asked.loss, channel, forward=forward)
        units = [asked.encode(NOBODY_KNOWS[:2]), asked.encode(NOBODY_KNOWS[2:])]
        out = engine.step([units[number] for number in engine.grid.units(2)])
        assert out.skip is None
        return engine.digest(), out.coefficients.tolist()

    alone = step(SoloChannel())
    assert on_ranks(2, step) == [alone] * 2
