"""Answered examples before a question: which, in what order, how many, and that all of it fits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.unit.asking import TEMPLATE, byte_pairs, classification, labelled, read, word_tokens
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.tasks.calibration import Calibrated
from zo_ds.tasks.demonstrations import Demonstrations, answered
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.prompts import PromptEncoder
from zo_ds.tasks.registry import resolve_task

TASK = classification(TEMPLATE, ["bad", "good"])
POOL = labelled(TASK, [f"the film {'very ' * number}is {word}" for number in range(6) for word in ("dull", "bright")])
ASKED = labelled(TASK, ["the cast is great"])[0]
AMPLE = 10_000


@cache
def line_breaks() -> Any:
    """Byte-level BPE in which two line breaks are one token at the end of a text, and two before a word (as GPT-2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["It was good\n\n"] * 9, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


TOKENIZERS = {"words": word_tokens, "pieces": byte_pairs, "line breaks": line_breaks}


def shown(example: Example) -> list[str]:
    """The demonstrations before ASKED."""
    assert example.prompt.endswith(ASKED.prompt)
    found = example.prompt.removesuffix(ASKED.prompt).split("\n\n")
    assert found.pop() == ""
    return found


def drawn(shots: int, seed: int, examples: list[Example] = POOL) -> list[str]:
    prompts = PromptEncoder(word_tokens(), AMPLE)
    return shown(Demonstrations(examples, shots, seed, prompts).before(ASKED, 1))


@given(st.integers(1, 15), st.integers(-5, 2**64))
def test_some_are_drawn_and_none_twice(shots: int, seed: int) -> None:
    found = drawn(shots, seed)
    assert len(found) == min(shots, len(POOL)) == len(set(found))
    assert set(found) <= {answered(example) for example in POOL}
    assert found == drawn(shots, seed)
    assert found == drawn(15, seed)[:shots]


def test_the_seed_decides_which_and_in_what_order() -> None:
    assert len({tuple(drawn(3, seed)) for seed in range(20)}) > 15
    # Of 400 draws of 3 among 12 every example has its share.
    count = [sum(answered(example) in drawn(3, seed) for seed in range(400)) for example in POOL]
    assert sum(count) == 1200
    assert all(60 < number < 140 for number in count)


def test_a_blank_line_is_between_them() -> None:
    one, two = labelled(TASK, ["text", "the plot"])
    demonstrations = Demonstrations([one, two], 2, 0, PromptEncoder(word_tokens(), AMPLE))
    found = demonstrations.before(ASKED, 1)
    first, second = "text It was bad", "the plot It was good"
    orders = (f"{first}\n\n{second}", f"{second}\n\n{first}")
    assert found.prompt in [f"{order}\n\nthe cast is great It was" for order in orders]
    # What may be cut is still the question's text alone.
    assert (found.text, found.after, found.label) == (ASKED.text, ASKED.after, ASKED.label)
    assert found.options == ASKED.options
    assert demonstrations.dropped == 0


@pytest.mark.parametrize("name", TOKENIZERS)
@given(limit=st.integers(20, 260), room=st.integers(0, 8), shots=st.integers(1, 12), seed=st.integers(0, 9))
def test_as_many_as_fit(name: str, limit: int, room: int, shots: int, seed: int) -> None:
    tokenizer = TOKENIZERS[name]()
    prompts = PromptEncoder(tokenizer, limit)
    demonstrations = Demonstrations(POOL, shots, seed, prompts)
    found = demonstrations.before(ASKED, room)
    bare = len(tokenizer(ASKED.prompt)["input_ids"])
    length = len(tokenizer(found.prompt)["input_ids"])
    everything = shown(Demonstrations(POOL, shots, seed, PromptEncoder(tokenizer, AMPLE)).before(ASKED, room))
    count = len(shown(found))
    # The first ones are left out.
    assert shown(found) == everything[shots - count :]
    assert demonstrations.dropped == (count < shots)
    if bare + room > limit:
        assert count == 0
        return
    # Nothing of the question is lost to what stands before it.
    assert length + room <= limit
    assert len(prompts.encode(found, room)) == length
    assert not prompts.cut
    if count < shots:
        more = "\n\n".join([*everything[shots - count - 1 :], ""])
        own = sum(len(tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]) for text in shown(found))
        own += len(tokenizer(f"{everything[shots - count - 1]}\n\n", add_special_tokens=False)["input_ids"])
        whole = len(tokenizer(more + ASKED.prompt)["input_ids"])
        assert max(whole, bare + own) + room > limit


def test_tokens_are_counted_in_the_whole_text() -> None:
    """Here the parts have fewer tokens than the whole, one for each demonstration."""
    tokenizer = line_breaks()
    whole = Demonstrations(POOL, 12, 0, PromptEncoder(tokenizer, AMPLE)).before(ASKED, 0)
    length = len(tokenizer(whole.prompt)["input_ids"])
    parts = sum(len(tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]) for text in shown(whole))
    assert parts + len(tokenizer(ASKED.prompt)["input_ids"]) == length - 12
    assert len(shown(Demonstrations(POOL, 12, 0, PromptEncoder(tokenizer, length)).before(ASKED, 0))) == 12
    for missing in range(1, 13):
        prompts = PromptEncoder(tokenizer, length - missing)
        assert len(shown(Demonstrations(POOL, 12, 0, prompts).before(ASKED, 0))) == 11
        assert not prompts.cut


def test_prompts_with_fewer_are_counted() -> None:
    long = labelled(TASK, ["the film " * 30])[0]
    prompts = PromptEncoder(word_tokens(), 70)
    demonstrations = Demonstrations(POOL, 2, 0, prompts)
    for example, dropped in ((ASKED, 0), (long, 1), (ASKED, 1), (long, 2)):
        demonstrations.before(example, 1)
        assert demonstrations.dropped == dropped
    few = Demonstrations(POOL[:3], 4, 0, PromptEncoder(word_tokens(), AMPLE))
    assert len(shown(few.before(ASKED, 1))) == 3
    assert few.dropped == 1


def test_a_question_that_is_too_long_alone_is_cut_as_ever() -> None:
    long = labelled(TASK, ["the film is " * 30])[0]
    prompts = PromptEncoder(word_tokens(), 20)
    found = Demonstrations(POOL, 3, 0, prompts).before(long, 1)
    assert found.prompt == long.prompt
    assert len(prompts.encode(found, 1)) == 19


SQUAD = {"title": "T", "context": "C", "question": "Q?", "answers": {"text": ["one", "two"]}}


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (labelled(TASK, ["text"])[0], "text It was bad"),
        (labelled(TASK, ["text", "text"])[1], "text It was good"),
        (Example("Q:", 1, options=(" x\n", " y\n")), "Q: y"),
        (Example("Q:", answers=("first", "second")), "Q: first"),
        (Example("b", 0, "a ", " c\n", options=("Yes\n\n",)), "a b c\nYes"),
        (read(resolve_task(TaskConfig(name="squad")), SQUAD)[0], "Title: T\nContext: C\nQuestion: Q?\nAnswer: one"),
        (read(resolve_task(TaskConfig(name="completion")), {"prompt": "1+1=", "completion": "2"})[0], "1+1=2"),
    ],
)
def test_an_answered_example(example: Example, text: str) -> None:
    assert answered(example) == text


def test_calibration_has_the_same_demonstrations() -> None:
    """What an option scores without the question's content depends on what stands before, too."""
    prompts = PromptEncoder(word_tokens(), AMPLE)
    found = Demonstrations(POOL, 2, 0, prompts).before(ASKED, 1)
    assert found.neutral == found.prompt.removesuffix(ASKED.prompt) + "It was"
    preview = Calibrated(OptionLikelihood(TASK, word_tokens(), AMPLE)).preview(found)
    assert preview.endswith(f"calibrated by the prompt {found.neutral!r}")
    without = Example("the cast", 0, options=(" a", " b"))
    assert Demonstrations(POOL, 2, 0, prompts).before(without, 1).neutral is None
