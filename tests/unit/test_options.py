"""The likelihood of options as continuations of a prompt, each against a forward of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.asking import (
    TEMPLATE,
    TEXTS,
    byte_pairs,
    causal,
    classification,
    labelled,
    log_likelihood,
    no_gradients,
    pack,
    read,
    scores_of,
    word_tokens,
)
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.calibration import Calibrated
from zo_ds.tasks.objectives import error, margin
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.registry import resolve_task
from zo_ds.tasks.scorer import is_right

FAMILIES = ("llama", "gpt2", "opt")
COPA = resolve_task(TaskConfig(name="copa"))
RECORD = resolve_task(TaskConfig(name="record"))
CHOICES = read(
    COPA,
    {"premise": "The film is bad.", "question": "effect", "choice1": "It was slow.", "choice2": "It!", "label": 0},
    {"premise": "The cast.", "question": "cause", "choice1": "A very very dull text.", "choice2": "It.", "label": 1},
)
GAPS = read(
    RECORD,
    {
        "passage": "the film\n@highlight\nbad",
        "query": "@placeholder is great.",
        "entities": ["Ann", "the good cast", "Bo"],
        "answers": ["Bo", "Ann"],
    },
    {"passage": "good", "query": "It was @placeholder", "entities": ["Cy", "dull Di"], "answers": ["dull Di"]},
    {"passage": "a", "query": "@placeholder", "entities": ["Ed"], "answers": ["Ed"]},
)


def tokens(text: str) -> list[int]:
    found: list[int] = byte_pairs()(text, add_special_tokens=False)["input_ids"]
    return found


def plainly(model: Any, example: Example, *, normalised: bool, most: int) -> Tensor:
    """Every option by a forward without padding, -inf for those that are not there."""
    found = torch.full((most,), -torch.inf, dtype=torch.float64)
    for number, option in enumerate(example.options):
        ids = tokens(option)
        total = log_likelihood(model, byte_pairs()(example.prompt)["input_ids"], ids)
        found[number] = total / len(ids) if normalised else total
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answers", [("bad", "good"), ("bad", "very good indeed", "dull !")])
def test_answers_of_a_causal_lm(family: str, answers: tuple[str, ...], packed: bool) -> None:
    model, task = causal(family, len(byte_pairs())), classification(TEMPLATE, answers)
    examples = labelled(task)
    scorer = OptionLikelihood(task, byte_pairs(), 64, normalised=False)
    if packed:
        pack(scorer, model, examples)
    batch = scorer.encode(examples)
    lengths = {len(tokens(f" {answer}")) for answer in answers}
    rows = len(examples) * (1 if lengths == {1} else len(answers))
    assert sum(len(asked.inputs["input_ids"]) for asked in batch.asked) == (1 if packed else rows)
    assert lengths == {1} or len(lengths) > 1
    if packed:
        # A prompt is there once, whatever its answers, and nothing is padded.
        extra = 0 if lengths == {1} else sum(len(option) - 1 for option in scorer.options(examples[0]))
        wanted = sum(scorer.length(example) + extra for example in examples)
        assert batch.asked[0].inputs["input_ids"].numel() == wanted
    scores, loss = (no_gradients(model)(function, batch) for function in (scorer.scores, scorer.loss))
    expected = torch.stack([plainly(model, e, normalised=False, most=len(answers)) for e in examples])
    if lengths == {1}:
        torch.testing.assert_close(scores.log_softmax(-1), expected.log_softmax(-1).float(), atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(scores, expected.float(), atol=1e-4, rtol=1e-5)
    right = torch.tensor([example.label for example in examples])
    torch.testing.assert_close(loss, -expected.log_softmax(-1).float()[range(4), right], atol=1e-4, rtol=1e-5)
    assert expected.std(0).min() > 1e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("examples", [CHOICES, GAPS], ids=["copa", "record"])
def test_options_of_each_example(examples: list[Example], family: str, normalised: bool, packed: bool) -> None:
    """Other numbers and lengths of options from example to example."""
    model, task = causal(family, len(byte_pairs()), 128), COPA if examples is CHOICES else RECORD
    scorer = OptionLikelihood(task, byte_pairs(), 128, normalised=normalised)
    if packed:
        pack(scorer, model, examples)
    most = max(len(example.options) for example in examples)
    assert len({len(tokens(option)) for example in examples for option in example.options}) > 2
    expected = torch.stack([plainly(model, e, normalised=normalised, most=most) for e in examples]).float()
    batch = scorer.encode(examples)
    calls = [asked.inputs["input_ids"].shape for asked in batch.asked]
    assert (len(calls) == 1 and calls[0][0] == 1) == packed
    scores, graded = (no_gradients(model)(function, batch) for function in (scorer.scores, scorer.grade))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    labels = torch.tensor([example.label for example in examples])
    losses = expected.double().logsumexp(-1) - expected.double()[range(len(labels)), labels]
    torch.testing.assert_close(graded[:, 1], losses, atol=1e-4, rtol=1e-5)
    # In any company: an example by itself, and the batch in another order.
    alone = torch.stack([scores_of(scorer, model, [example])[0, :1] for example in examples])
    torch.testing.assert_close(alone, expected[:, :1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores_of(scorer, model, examples[::-1]), expected.flip(0), atol=1e-4, rtol=1e-5)


def test_one_token_options_are_read_off_one_position_and_score_the_same() -> None:
    """The short cut gives logits, the general path log-likelihoods: the same up to a constant of each example."""
    model, task = causal("llama", len(byte_pairs())), classification(TEMPLATE, ("bad", "good"))
    scorer, examples = OptionLikelihood(task, byte_pairs(), 64), labelled(task)
    short = scorer.encode(examples)
    assert (short.lengths.numel(), len(short.targets)) == (0, 2)
    # One example with other options keeps the whole batch from it.
    odd = replace(examples[0], options=(" great", " a", " the"))
    general = scorer.encode([*examples, odd])
    assert general.lengths.shape == (5, 3)
    call = no_gradients(model)
    one, other = call(scorer.scores, short), call(scorer.scores, general)[:4, :2]
    torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(call(scorer.loss, short), call(scorer.loss, general)[:4], atol=1e-4, rtol=0)
    for objective in (margin, error):
        own = OptionLikelihood(task, byte_pairs(), 64, objective)
        pairs = [call(own.loss, own.encode(batch)) for batch in (examples, [*examples, odd])]
        torch.testing.assert_close(pairs[0], pairs[1][:4], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [(" bad", " good", " the"), (" bad", " very good indeed", " the")])
def test_any_accepted_option_counts_as_right(options: tuple[str, ...]) -> None:
    """In the short cut of one token as well as in the general path."""
    model = causal("llama", len(byte_pairs()))
    scorer = OptionLikelihood(RECORD, byte_pairs(), 64)
    example = Example("the film", 0, options=options)
    best = int(scores_of(scorer, model, [example]).argmax())
    others = [number for number in range(3) if number != best]
    call = no_gradients(model)

    def right(label: int, answers: tuple[str, ...]) -> float:
        return float(call(scorer.grade, scorer.encode([replace(example, label=label, answers=answers)]))[0, 0])

    assert right(best, ()) == 1
    assert right(others[0], ()) == 0
    assert right(others[0], (options[others[0]], options[best])) == 1
    assert right(others[0], (options[others[0]], options[others[1]])) == 0


def test_ties_go_to_the_first_option_and_absent_options_never_win() -> None:
    batch = OptionLikelihood(RECORD, byte_pairs(), 64).encode(GAPS)
    scores = torch.tensor([[-1.0, -2.0, -1.0], [-5.0, -5.0, -torch.inf], [-9.0, -torch.inf, -torch.inf]])
    # Labels are 2 (and Ann, option 0, is accepted), 1 and 0.
    assert batch.labels.tolist() == [2, 1, 0]
    assert is_right(scores, batch).tolist() == [1, 0, 1]
    assert batch.accepted.tolist() == [[True, False, True], [False, True, False], [True, False, False]]


def test_answers_fit_behind_a_cut_prompt() -> None:
    task = classification(TEMPLATE, ("bad", "very good indeed"))
    scorer = OptionLikelihood(task, byte_pairs(), 30)
    assert scorer.encode(labelled(task, ["good " * 60])).asked[0].inputs["input_ids"].shape[1] <= 30
    assert scorer.prompts.truncated == 1


def test_an_option_that_does_not_fit_names_the_row() -> None:
    (example,) = read(RECORD, {"passage": "a", "query": "@placeholder" + "!" * 70, "entities": ["B"], "answers": ["B"]})
    with pytest.raises(DataError, match="the limit is 64") as caught:
        OptionLikelihood(RECORD, byte_pairs(), 64).encode([example])
    assert caught.value.where == "rows.jsonl:1"


@pytest.mark.parametrize("answers", [("marvellous", "awful"), ("marvellous", "awful", "bad")])
def test_answers_that_are_the_same_token(answers: tuple[str, ...]) -> None:
    task = classification(TEMPLATE, answers)
    with pytest.raises(ConfigError, match="same token"):
        OptionLikelihood(task, word_tokens(), 32).encode(labelled(task))


def test_answers_that_are_the_same_tokens() -> None:
    """Neither can ever win: both words of each are unknown."""
    task = classification(TEMPLATE, ("truly marvellous", "really awful"))
    with pytest.raises(ConfigError, match="same token"):
        OptionLikelihood(task, word_tokens(), 32).encode(labelled(task))


def test_a_prompt_without_tokens_begins_with_one_that_models_know() -> None:
    words, model = word_tokens(), causal("llama", len(word_tokens()))
    example = Example("", 0, options=(" bad film", " good"))
    found = scores_of(OptionLikelihood(RECORD, words, 32), model, [example])[0]
    start = [words.eos_token_id]
    options = [words(option, add_special_tokens=False)["input_ids"] for option in example.options]
    expected = torch.stack([log_likelihood(model, start, ids) / len(ids) for ids in options])
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-5)


# Calibration


@pytest.mark.parametrize(
    "examples", [CHOICES, labelled(classification(TEMPLATE, ("bad", "very good")))], ids=["copa", "own"]
)
@pytest.mark.parametrize("normalised", [False, True])
def test_what_an_option_scores_without_content_is_subtracted(examples: list[Example], normalised: bool) -> None:
    model, task = (
        causal("llama", len(byte_pairs()), 128),
        COPA if examples is CHOICES else classification(TEMPLATE, ("bad", "very good")),
    )
    scorer = Calibrated(OptionLikelihood(task, byte_pairs(), 128, normalised=normalised))
    expected = []
    for example in examples:
        blank = Example("", after=example.neutral or "", options=example.options)
        own, without = (plainly(model, e, normalised=normalised, most=2) for e in (example, blank))
        expected.append(own - without)
    wanted = torch.stack(expected)
    batch = scorer.encode(examples).to(torch.device("cpu"))
    scores, loss, graded = (no_gradients(model)(f, batch) for f in (scorer.scores, scorer.loss, scorer.grade))
    torch.testing.assert_close(scores, wanted.float(), atol=1e-4, rtol=1e-5)
    labels = torch.tensor([example.label for example in examples])
    losses = wanted.logsumexp(-1) - wanted[range(len(labels)), labels]
    torch.testing.assert_close(loss, losses.float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        graded, torch.stack([(wanted.argmax(-1) == labels).double(), losses], 1), atol=1e-4, rtol=1e-5
    )
    assert scorer.length(examples[0]) == len(byte_pairs()(examples[0].prompt)["input_ids"])


def test_calibration_keeps_absent_options_out() -> None:
    model = causal("llama", len(byte_pairs()), 128)
    scores = scores_of(Calibrated(OptionLikelihood(RECORD, byte_pairs(), 128)), model, GAPS)
    assert scores.isneginf().tolist() == [[False] * 3, [False, False, True], [False, True, True]]
    assert not scores.isnan().any()


def test_calibration_passes_on_what_is_settled() -> None:
    task = classification(TEMPLATE, ("bad", "good"))
    inner, model = OptionLikelihood(task, byte_pairs(), 64), causal("llama", len(byte_pairs()))
    examples = labelled(task)
    Calibrated(inner).settle(model, no_gradients(model), examples, torch.device("cpu"), lockstep=True)
    assert inner.lockstep
    assert inner.packing is not None


def test_a_task_without_a_neutral_prompt_cannot_be_calibrated() -> None:
    task = classification("{text}", ("bad", "good"))
    with pytest.raises(ConfigError, match="no prompt without content"):
        Calibrated(OptionLikelihood(task, byte_pairs(), 64)).encode(labelled(task, TEXTS[:1]))
