"""Tasks, prompts cut to the model's limit, words at a mask and heads against forwards without padding or batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.unit.asking import (
    SIZE,
    TEMPLATE,
    TEXTS,
    TOKENIZERS,
    byte_pairs,
    causal,
    classification,
    labelled,
    masking,
    no_gradients,
    pack,
    randomised,
    read,
    scores_of,
    word_tokens,
)
from zo_ds.config.schema import DataConfig, TaskConfig
from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.head import Head
from zo_ds.tasks.likelihood import TextLikelihood
from zo_ds.tasks.masked import LabelWords
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.prompts import PromptEncoder
from zo_ds.tasks.registry import TASKS, TEMPLATES, resolve_task
from zo_ds.tasks.scorer import Scorer
from zo_ds.tasks.task import Metric, Objective

MASKED = "{text} It was {mask} ."
ENCODER: dict[str, Any] = {**SIZE, "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}


# Tasks


@pytest.mark.parametrize(
    ("given", "mention"),
    [
        ({"name": "movie-sentimet"}, "did you mean 'movie-sentiment'?"),
        ({"name": "zzz"}, "known tasks: classification"),
        ({"name": "classification"}, "needs a template"),
        ({"name": "classification", "template": TEMPLATE}, "needs label words"),
        ({"template": "It was", "label_words": ["a", "b"]}, "exactly once"),
        ({"template": "{text} {text}", "label_words": ["a", "b"]}, "exactly once"),
        ({"template": TEMPLATE, "label_words": ["a"]}, "two or more different words"),
        ({"template": TEMPLATE, "label_words": ["a", "b", "a"]}, "two or more different words"),
        ({"template": TEMPLATE, "label_words": ["a", " "]}, "two or more different words"),
        ({"template": TEMPLATE, "label_words": []}, "label words"),
        ({"name": "sst2", "template": TEMPLATE}, "the task 'sst2' has its own prompt"),
        ({"name": "chat", "label_words": ["a", "b"]}, "the task 'chat' has its own prompt"),
        ({"name": "squad", "objective": "margin"}, "the task 'squad' has no options to choose from"),
        ({"name": "squad", "objective": "cross_entropy"}, "use answer or f1"),
        ({"name": "text", "objective": "accuracy"}, "the task 'text' has no options to choose from"),
        ({"name": "sst2", "objective": "f1"}, "no accepted answers"),
        ({"name": "completion", "objective": "f1"}, "no accepted answers"),
        ({"name": "completion", "objective": "reward"}, "set both"),
        ({"name": "completion", "reward": "my:function"}, "set both"),
        ({"name": "completion", "objective": "reward", "reward": "my:function"}, "length of generated answers"),
        ({"name": "text", "objective": "reward", "reward": "my:f", "max_new_tokens": 8}, "no prompt to write"),
        ({"name": "chat", "objective": "reward", "reward": "my:f", "max_new_tokens": 8}, "no prompt to write"),
    ],
)
def test_refused_tasks(given: dict[str, Any], mention: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_task(TaskConfig(**given))
    assert mention in str(caught.value)
    assert caught.value.where.startswith("task.")


def test_presets_and_what_a_recipe_puts_in_their_place() -> None:
    preset = TEMPLATES["movie-sentiment"]
    assert preset is not None
    found = resolve_task(TaskConfig(name="movie-sentiment"))
    assert (found.template, found.label_words, found.classes) == (*preset, 2)
    other = resolve_task(TaskConfig(name="movie-sentiment", label_words=("bad", "good", "dull")))
    assert (other.template, other.label_words, other.classes) == (preset[0], ("bad", "good", "dull"), 3)
    assert resolve_task(TaskConfig(name="movie-sentiment", template="? {text}")).template == "? {text}"
    own = resolve_task(TaskConfig(template="{text}", label_words=("a", "b")))
    assert (own.name, own.template, own.label_words, own.masked) == ("classification", "{text}", ("a", "b"), False)
    assert resolve_task(TaskConfig(name="movie-sentiment-masked")).masked


def test_every_task_is_there_with_an_objective_that_suits_it() -> None:
    own = {"template": TEMPLATE, "label_words": ("a", "b")}
    for name in TASKS:
        task = resolve_task(TaskConfig(name=name, **(own if name == "classification" else {})))
        assert task.name == name
        assert resolve_task(
            TaskConfig(name=name, objective=task.objective.value, **(own if task.name in TEMPLATES else {}))
        )


def test_what_is_reported_where_a_reward_is_learned() -> None:
    asked: dict[str, Any] = {"objective": "reward", "reward": "my:function", "max_new_tokens": 8}
    found = {name: resolve_task(TaskConfig(name=name, **asked)) for name in ("completion", "squad", "sst2")}
    assert {name: task.metric for name, task in found.items()} == {
        "completion": Metric.REWARD,
        "squad": Metric.F1,
        "sst2": Metric.ACCURACY,
    }
    assert all((task.objective, task.max_new_tokens) == (Objective.REWARD, 8) for task in found.values())
    assert resolve_task(TaskConfig(name="squad")).max_new_tokens == 50


@pytest.mark.parametrize(
    ("template", "prompt", "options", "neutral"),
    [
        ("{text} It was", "x It was", (" bad", " good"), "It was"),
        ("Review: {text}\nAnswer:\n", "Review: x\nAnswer:\n", ("bad", "good"), "Review: \nAnswer:"),
        ("{text}", "x", (" bad", " good"), None),
    ],
)
def test_a_row_of_a_classification_task(
    template: str, prompt: str, options: tuple[str, ...], neutral: str | None
) -> None:
    (example,) = read(classification(template, ("bad", "good")), {"text": "x", "label": "good"})
    assert (example.prompt, example.text, example.label) == (prompt, "x", 1)
    assert (example.options, example.neutral, example.where) == (options, neutral, "rows.jsonl:1")


def test_columns_have_the_names_of_the_recipe() -> None:
    config = TaskConfig(name="movie-sentiment")
    task = resolve_task(config, DataConfig(path=".", text_field="a.b", label_field="y"))
    assert task.read(Row({"a": {"b": "x"}, "y": 0}, ""))[0].text == "x"
    assert task.read(Row({"a.b": "z", "a": {"b": "x"}, "y": 0}, ""))[0].text == "z"


# Prompts


def film(text: str) -> Example:
    return Example(text, before="the film : ", after=" It was")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("limit", [15, 18, 23])
@pytest.mark.parametrize("room", [0, 3])
def test_a_long_text_loses_its_end(kind: str, limit: int, room: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoder = PromptEncoder(tokenizer, limit + room)
    ends = tokenizer("")["input_ids"]
    tail = tokenizer(" It was", add_special_tokens=False)["input_ids"] + (ends[-1:] if len(ends) == 2 else [])
    long = ["good bad " * 40, "dull, très dull \U0001f3ac " * 20, "x" * 300 + " good", "good " + "\n \t" * 100 + "bad"]
    for text in long:
        ids = encoder.encode(film(text), room)
        assert len(ids) <= limit
        assert ids[-len(tail) :] == tail
    if kind == "words":
        kept = " ".join((["good", "bad"] * 40)[: limit - 5])
        assert encoder.encode(film(long[0]), room) == tokenizer(f"the film : {kept} It was")["input_ids"]


def test_each_text_is_counted_once() -> None:
    words = word_tokens()
    encoder = PromptEncoder(words, 8)
    fits = "good " * 6
    assert encoder.encode(Example(fits, after=" It was")) == words(f"{fits} It was")["input_ids"]
    assert encoder.truncated == 0
    for text, room in (("good " * 7, 0), ("bad " * 9, 0), ("good " * 7, 0), ("good " * 7, 2)):
        encoder.encode(Example(text, after=" It was"), room)
    assert encoder.truncated == 2
    # Cut from the end: the first words stay.
    assert encoder.encode(Example("good " * 7, after=" It was")) == encoder.encode(Example(fits, after=" It was"))


def test_a_template_that_leaves_no_room() -> None:
    encoder = PromptEncoder(word_tokens(), 3)
    assert len(encoder.encode(Example("good bad", after=" It was"))) == 3
    with pytest.raises(DataError, match="takes 2 tokens and its answer 2, the limit is 3") as caught:
        encoder.encode(Example("good bad", after=" It was", where="train.jsonl:4"), 2)
    assert caught.value.where == "train.jsonl:4"


# Masked LMs and heads


def masked(family: str, vocabulary: int) -> nn.Module:
    if family == "bert":
        return randomised(BertForMaskedLM(BertConfig(vocab_size=vocabulary, **ENCODER)))
    return randomised(RobertaForMaskedLM(RobertaConfig(vocab_size=vocabulary, **ENCODER)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_words_at_the_mask(family: str, packed: bool) -> None:
    tokenizer, task = masking(), classification(MASKED, ("terrible", "great"))
    model = masked(family, len(tokenizer))
    texts = [*TEXTS, "a <mask> film , <mask> <mask>", "{mask} {text}"]
    scorer = LabelWords(task, tokenizer, 32)
    if packed:
        pack(scorer, model, labelled(task))
        assert scorer.packing is not None
        assert scorer.packing.first_position == (0 if family == "bert" else tokenizer.pad_token_id + 1)
    scores = scores_of(scorer, model, labelled(task, texts))
    options = tokenizer.convert_tokens_to_ids(["terrible", "great"])
    for text, found in zip(texts, scores, strict=True):
        ids = tokenizer(f"{text.replace('<mask>', ' ')} It was <mask> .")["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id), options]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_a_mask_stays_where_a_text_is_cut() -> None:
    task = classification(MASKED, ("terrible", "great"))
    scorer = LabelWords(task, masking(), 12)
    (asked,) = scorer.encode(labelled(task, ["good " * 40])).asked
    assert asked.inputs["input_ids"].shape == (1, 12)
    assert asked.inputs["input_ids"][0, int(asked.columns)] == masking().mask_token_id


@pytest.mark.parametrize("template", [TEMPLATE, "{text} It was <mask>", "{mask} {text} {mask}"])
def test_masks_in_a_template(template: str) -> None:
    with pytest.raises(ConfigError, match="mask"):
        LabelWords(classification(template, ("terrible", "great")), masking(), 32)


def test_a_masked_task_needs_a_mask_token_and_known_words() -> None:
    with pytest.raises(ConfigError, match="no mask token"):
        LabelWords(classification(MASKED, ("terrible", "great")), word_tokens(), 32)
    with pytest.raises(ConfigError, match="'marvellous' is not one token"):
        LabelWords(classification(MASKED, ("terrible", "marvellous")), masking(), 32)


def test_masked_words_that_are_the_same_token() -> None:
    with pytest.raises(ConfigError, match="same token"):
        LabelWords(classification(MASKED, ("great", "Great")), masking(), 32)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_classification_head(family: str) -> None:
    tokenizer = masking()
    size = {"vocab_size": len(tokenizer), "num_labels": 3}
    model = randomised(
        BertForSequenceClassification(BertConfig(**ENCODER, **size))
        if family == "bert"
        else GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **size))
    )
    task = classification("{text}", ("a", "b", "c"))
    scorer = Head(task, tokenizer, 32)
    scores = scores_of(scorer, model, labelled(task))
    with torch.no_grad():
        expected = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert scorer.packings(model) == ()


class Deaf(nn.Module):
    """Takes whatever a model takes, and leaves out what it is told about rows."""

    def __init__(self, model: nn.Module, ignored: str) -> None:
        super().__init__()
        self.inner, self.config, self.ignored = model, model.config, ignored

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**{key: value for key, value in inputs.items() if key != self.ignored})


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_models_that_do_not_take_packed_rows_get_padded_ones(ignored: str) -> None:
    model, task = Deaf(causal("gpt2", len(byte_pairs())), ignored), classification(TEMPLATE, ("bad", "good"))
    scorer = OptionLikelihood(task, byte_pairs(), 64)
    scorer.settle(model, no_gradients(model), labelled(task), torch.device("cpu"))
    assert scorer.packing is None


def test_sequences_longer_than_the_models_window_are_padded() -> None:
    model, task = causal("llama", len(byte_pairs())), classification(TEMPLATE, ("bad", "good"))
    scorer, examples = OptionLikelihood(task, byte_pairs(), 64), labelled(task)
    pack(scorer, model, examples)
    longest = max(map(scorer.length, examples))
    for window, rows in ((longest, 1), (longest - 1, len(examples))):
        assert scorer.packing is not None
        scorer.packing = replace(scorer.packing, window=window)
        assert len(scorer.encode(examples).asked[0].inputs["input_ids"]) == rows


def test_a_batch_moves_with_all_its_parts() -> None:
    task = classification(TEMPLATE, ("bad", "very good indeed"))
    batch = OptionLikelihood(task, byte_pairs(), 64).encode(labelled(task)).to(torch.device("meta"))
    tensors: list[Tensor] = [batch.labels, batch.targets, batch.lengths, batch.accepted]
    for asked in batch.asked:
        tensors += [asked.rows, asked.columns, asked.slots, *asked.inputs.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_in_lockstep_every_batch_is_one_call() -> None:
    """Elsewhere a few long sequences get a call of their own; ranks of a shard group must call equally often."""
    words, task = word_tokens(), classification("{text} It was", ("bad", "very good"))
    masked_task = classification(MASKED, ("terrible", "great"))
    model = causal("llama", len(words), 256)
    texts = ["good", "bad " * 200, "a film", "dull " * 190]
    text = resolve_task(TaskConfig(name="text"))
    scorers: list[tuple[Scorer, list[Example]]] = [
        (OptionLikelihood(task, words, 256), labelled(task, texts)),
        (OptionLikelihood(classification(TEMPLATE, ("bad", "good")), words, 256), labelled(task, texts)),
        (TextLikelihood(text, words, 256), read(text, *({"text": each} for each in texts))),
        (LabelWords(masked_task, masking(), 256), labelled(masked_task, texts)),
        (Head(task, words, 256), labelled(task, texts)),
    ]
    for scorer, examples in scorers:
        assert len(scorer.encode(examples).asked) == 2
        kept = scores_of(scorer, model, examples) if isinstance(scorer, OptionLikelihood) else None
        scorer.lockstep = True
        assert len(scorer.encode(examples).asked) == 1
        if kept is not None:
            torch.testing.assert_close(scores_of(scorer, model, examples), kept, atol=1e-4, rtol=1e-5)
