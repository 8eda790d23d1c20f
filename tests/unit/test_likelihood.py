"""Texts to be learned: which tokens count, what is cut, and losses against a forward for each example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.unit.asking import (
    byte_pairs,
    causal,
    classification,
    log_probabilities,
    no_gradients,
    pack,
    read,
    word_tokens,
)
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.likelihood import AnswerLikelihood, ChatLikelihood, CompletionLikelihood, Likelihood, TextLikelihood
from zo_ds.tasks.registry import resolve_task

FAMILIES = ("llama", "gpt2", "opt")
COMPLETION, TEXT, CHAT = (resolve_task(TaskConfig(name=name)) for name in ("completion", "text", "chat"))
TURNS = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
Conversation = Sequence[tuple[str, str]]


def completion(prompt: str, answer: str) -> Example:
    return read(COMPLETION, {"prompt": prompt, "completion": answer})[0]


def text(words: str) -> Example:
    return read(TEXT, {"text": words})[0]


def chat(*turns: tuple[str, str]) -> Example:
    return read(CHAT, {"messages": [{"role": role, "content": content} for role, content in turns]})[0]


def chatting(template: str = TURNS, tokenizer: Any = None) -> Any:
    found = copy.deepcopy(tokenizer or byte_pairs())
    found.chat_template = template
    return found


def tokens(words: str) -> list[int]:
    found: list[int] = byte_pairs()(words, add_special_tokens=False)["input_ids"]
    return found


def loss_of(model: Any, ids: Sequence[int], learned: Sequence[int]) -> float:
    """Mean negative log-likelihood of some tokens of a sequence, each predicted from all before it."""
    found = log_probabilities(model, ids)
    return -sum(float(found[position - 1, ids[position]]) for position in learned) / len(learned)


def check(scorer: Likelihood, examples: list[Example], spans: list[tuple[list[int], list[int]]], family: str) -> None:
    """Losses in padded and in packed rows, and grades, are those of a plain loop."""
    model = causal(family, len(byte_pairs()), 128)
    expected = torch.tensor([loss_of(model, *span) for span in spans], dtype=torch.float64)
    assert float(expected.std()) > 1e-2
    call = no_gradients(model)
    for packed in (False, True):
        if packed:
            pack(scorer, model, examples)
        batch = scorer.encode(examples)
        assert (sum(len(asked.inputs["input_ids"]) for asked in batch.asked) == 1) == packed
        torch.testing.assert_close(call(scorer.loss, batch).double(), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(call(scorer.grade, batch), expected.unsqueeze(1), atol=1e-4, rtol=1e-5)
    assert scorer.columns == ("loss",)
    # Nobody computes what follows the last token.
    inputs = sum(len(ids) - (learned[-1] == len(ids) - 1) for ids, learned in spans)
    assert batch.asked[0].inputs["input_ids"].numel() == inputs
    assert [scorer.length(example) for example in examples] == [len(ids) for ids, _ in spans]


# Completions


@pytest.mark.parametrize("family", FAMILIES)
def test_completions(family: str) -> None:
    pairs = [("the film", " is bad"), ("a dull plot\n", "good good text !"), ("", "cast"), ("the the", " x")]
    examples, spans = [completion(*pair) for pair in pairs], []
    for prompt, answer in pairs:
        stem, own = byte_pairs()(prompt)["input_ids"], tokens(answer)
        spans.append(([*stem, *own], list(range(len(stem), len(stem) + len(own)))))
    check(AnswerLikelihood(COMPLETION, byte_pairs(), 64), examples, spans, family)


@pytest.mark.parametrize(("answer", "limit", "ends"), [(" good", 64, True), (" good" * 40, 10, False)])
def test_a_completion_ends_the_text_unless_it_was_cut(answer: str, limit: int, ends: bool) -> None:
    end = byte_pairs().eos_token_id
    ids, learned = CompletionLikelihood(COMPLETION, byte_pairs(), limit).known_spans(completion("the film", answer))
    assert (ids[-1] == end) == ends
    assert ids.count(end) == ends
    assert learned == list(range(learned[0], len(ids)))
    assert len(ids) <= limit


def test_the_right_option_is_what_is_learned() -> None:
    task = classification("{text} It was", ("bad", "very good"), objective="answer")
    (example,) = read(task, {"text": "the film", "label": 1})
    ids, learned = AnswerLikelihood(task, byte_pairs(), 64).spans(example)
    assert ids == [*byte_pairs()("the film It was")["input_ids"], *tokens(" very good")]
    assert [ids[position] for position in learned] == tokens(" very good")


@pytest.mark.parametrize(
    ("prompt", "answer", "kept", "truncated"),
    [
        (6, 4, (6, 4), 0),
        (20, 4, (6, 4), 1),
        (2, 20, (2, 8), 1),
        (3, 7, (3, 7), 0),
        (30, 30, (5, 5), 1),
        (9, 6, (5, 5), 1),
        (0, 30, (1, 9), 1),
    ],
)
def test_what_is_cut_of_prompts_and_completions(
    prompt: int, answer: int, kept: tuple[int, int], truncated: int
) -> None:
    """The prompt loses its end, but not more than half of the limit; what it leaves free is the answer's."""
    words = word_tokens()
    good, bad = words.convert_tokens_to_ids(["good", "bad"])
    scorer = AnswerLikelihood(COMPLETION, words, 10)
    ids, learned = scorer.known_spans(completion("good " * prompt, " bad" * answer))
    start = [good] * kept[0] if prompt else [words.eos_token_id]
    assert ids == start + [bad] * kept[1]
    assert learned == list(range(kept[0], sum(kept)))
    assert scorer.prompts.truncated == truncated


# Texts


@pytest.mark.parametrize("family", FAMILIES)
def test_texts(family: str) -> None:
    texts = ["the film is bad", "good", "a dull plot , not very bright", "x"]
    rows = [[*byte_pairs()(words)["input_ids"], byte_pairs().eos_token_id] for words in texts]
    scorer = TextLikelihood(TEXT, byte_pairs(), 64)
    check(scorer, [text(words) for words in texts], [(ids, list(range(1, len(ids)))) for ids in rows], family)


def test_an_end_that_is_there_is_not_doubled() -> None:
    ids, _ = TextLikelihood(TEXT, byte_pairs(), 64).spans(text("good</s>"))
    assert ids == [byte_pairs().bos_token_id, *tokens("good"), byte_pairs().eos_token_id]


def test_a_long_text_loses_its_end_and_is_counted_once() -> None:
    scorer = TextLikelihood(TEXT, word_tokens(), 5)
    (good,) = word_tokens()("good")["input_ids"]
    for _ in range(2):
        scorer.encode([text("good " * 9), text("good " * 9), text("good good")])
    assert scorer.known_spans(text("good " * 9)) == ([good] * 5, [1, 2, 3, 4])
    assert scorer.prompts.truncated == 1


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_row_of_which_nothing_is_left_is_named(kind: str) -> None:
    cases: dict[str, tuple[type[Likelihood], Example, int]] = {
        "text": (TextLikelihood, text("good film"), 1),
        "chat": (ChatLikelihood, chat(("user", "good " * 20), ("assistant", "bad")), 12),
    }
    kind_of, example, limit = cases[kind]
    with pytest.raises(DataError, match="nothing of this example can be learned") as caught:
        kind_of(CHAT, chatting(), limit).encode([example])
    assert caught.value.where == "rows.jsonl:1"


# Conversations


def by_hand(turns: Conversation) -> tuple[list[int], list[int]]:
    """Ids of a conversation in `TURNS`, and which of them hold a part of an assistant's message or its line break."""
    whole, learned = "", set[int]()
    for role, content in turns:
        whole += f"[{role}] "
        if role == "assistant":
            learned |= set(range(len(whole), len(whole) + len(content) + 1))
        whole += f"{content}\n"
    ids = tokens(whole)
    # Every byte of ASCII is a character of its token.
    ends = [sum(len(piece) for piece in byte_pairs().convert_ids_to_tokens(ids[: k + 1])) for k in range(len(ids))]
    starts = [0, *ends[:-1]]
    assert ends[-1] == len(whole)
    return ids, [number for number, span in enumerate(zip(starts, ends, strict=True)) if learned & set(range(*span))]


CONVERSATIONS: list[Conversation] = [
    [("user", "the film"), ("assistant", "is bad")],
    [("system", "a dull plot"), ("user", "not"), ("assistant", "very good"), ("user", "x"), ("assistant", "cast !")],
    [("user", "good"), ("assistant", "the the cast"), ("user", "and what follows is nobody's to learn")],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations(family: str) -> None:
    examples, spans = [chat(*turns) for turns in CONVERSATIONS], [by_hand(turns) for turns in CONVERSATIONS]
    for (ids, learned), turns in zip(spans, CONVERSATIONS, strict=True):
        said = "".join(f"{content}\n" for role, content in turns if role == "assistant")
        # The space of the header may be in the token of the first word.
        assert byte_pairs().decode([ids[position] for position in learned]).replace(" ", "") == said.replace(" ", "")
    check(ChatLikelihood(CHAT, chatting(), 128), examples, spans, family)


def test_a_long_conversation_loses_its_end() -> None:
    whole = by_hand(CONVERSATIONS[1])
    scorer = ChatLikelihood(CHAT, chatting(), len(whole[0]) - 3)
    ids, learned = scorer.known_spans(chat(*CONVERSATIONS[1]))
    assert (ids, learned) == (whole[0][:-3], [position for position in whole[1] if position < len(ids)])
    assert scorer.prompts.truncated == 1


def test_an_assistant_who_begins() -> None:
    ids, learned = ChatLikelihood(CHAT, chatting(), 64).spans(chat(("assistant", "good"), ("user", "x")))
    assert byte_pairs().decode(ids[: learned[-1] + 1]) == "[assistant] good\n"
    assert learned == list(range(1, learned[-1] + 1))


def test_a_token_across_the_border_of_a_message_is_learned() -> None:
    """Two line breaks are one token here: the header's last one and the message's first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role[0] + '\n' + m.content + '#' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a\n' }}{% endif %}"
    tokenizer = chatting(template, PreTrainedTokenizerFast(tokenizer_object=inner))
    example = chat(("user", "x"), ("assistant", "\nyes"))
    ids, learned = ChatLikelihood(CHAT, tokenizer, 64).spans(example)
    assert tokenizer.convert_ids_to_tokens(ids) == ["u", "Ċ", "x", "#", "a", "ĊĊ", "y", "e", "s", "#"]
    assert learned == [5, 6, 7, 8, 9]


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatLikelihood(CHAT, word_tokens(), 64)


@pytest.mark.parametrize(
    ("template", "mention"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}", "message 2 of 4"),
        ("{{ messages[0].nothing + 1 }}", "no attribute 'nothing'"),
    ],
)
def test_templates_that_do_not_go_together_with_a_conversation(template: str, mention: str) -> None:
    example = chat(*CONVERSATIONS[0], ("user", "x"), ("assistant", "y"))
    with pytest.raises(DataError, match="the chat template") as caught:
        ChatLikelihood(CHAT, chatting(template), 64).encode([example])
    assert caught.value.where == "rows.jsonl:1"
    assert mention in caught.value.why


# Rows


@pytest.mark.parametrize(
    ("task", "row", "mention"),
    [
        ("text", {"text": ""}, "'text' is not a text"),
        ("text", {"txt": "a"}, "no 'text'"),
        ("completion", {"prompt": "a"}, "no 'completion'"),
        ("completion", {"prompt": "a", "completion": " "}, "'completion' is not a text"),
        ("completion", {"prompt": None, "completion": "a"}, "'prompt' is not a text"),
        ("chat", {"messages": []}, "not a list of messages"),
        ("chat", {"messages": "hello"}, "not a list of messages"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "without an assistant's message"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, "message 1 is not a role and a content"),
        ("chat", {"messages": [{"role": "assistant", "content": 5}]}, "message 1 is not a role and a content"),
        ("chat", {"messages": ["a"]}, "message 1 is not a role and a content"),
    ],
)
def test_malformed_rows(task: str, row: dict[str, Any], mention: str) -> None:
    with pytest.raises(DataError) as caught:
        read(resolve_task(TaskConfig(name=task)), row)
    assert mention in caught.value.what
    assert caught.value.where == "rows.jsonl:1"
