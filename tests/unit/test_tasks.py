"""Tasks, prompts cut to the model's limit, and scores against forwards without padding or batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.launch import jobs
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError
from zo_ds.tasks.prompts import PromptEncoder
from zo_ds.tasks.registry import TASKS, Task, resolve_task
from zo_ds.tasks.scoring import SCORERS, Head, LabelWords, OptionLikelihood, Scorer

TEMPLATE = "{text} It was"
TEXTS = ["the film is bad", "good", "a dull plot , not very bright", "the the cast is great text"]
EXAMPLES = [Example(text, number % 2) for number, text in enumerate(TEXTS)]
SPECIAL = ["<pad>", "<unk>", "</s>", "<s>", "<mask>"]
MASKED = "{text} It was {mask} ."
SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER: dict[str, Any] = {**SIZE, "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(jobs.make_model(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def pieces() -> Any:
    """Byte-level BPE in which only a few words are one token."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([f"{text} It was bad good good" for text in TEXTS] * 3, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="module")
def masking() -> Any:
    """Word-level with a mask, lower-casing, and the special tokens of an encoder around a text."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *jobs.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", cls_token="<s>"
    )


def randomised(model: nn.Module) -> nn.Module:
    """Weights large enough that every position and token matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def causal(family: str, vocabulary: int) -> nn.Module:
    size = {**SIZE, "vocab_size": vocabulary, "max_position_embeddings": 64}
    if family == "llama":
        return randomised(LlamaForCausalLM(LlamaConfig(**size, intermediate_size=24)))
    if family == "opt":
        return randomised(OPTForCausalLM(OPTConfig(**size, ffn_dim=24, word_embed_proj_dim=16)))
    return randomised(GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2)))


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
    ],
)
def test_refused_tasks(given: dict[str, Any], mention: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_task(TaskConfig(**given))
    assert mention in str(caught.value)
    assert caught.value.where.startswith("task.")


def test_presets_and_what_a_recipe_puts_in_their_place() -> None:
    preset = TASKS["movie-sentiment"]
    assert preset is not None
    assert resolve_task(TaskConfig(name="movie-sentiment")) == preset
    other = TaskConfig(name="movie-sentiment", label_words=("bad", "good", "dull"))
    assert resolve_task(other) == Task(preset.template, ("bad", "good", "dull"))
    assert resolve_task(TaskConfig(name="movie-sentiment", template="? {text}")).template == "? {text}"
    assert resolve_task(TaskConfig(template="{text}", label_words=("a", "b"))) == Task("{text}", ("a", "b"))


# Prompts


@pytest.mark.parametrize("kind", ["words", "pieces", "masking"])
@pytest.mark.parametrize("limit", [15, 18, 23])
def test_a_long_text_loses_its_end(kind: str, limit: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    encoder = PromptEncoder(tokenizer, lambda text: f"the film : {text} It was", limit)
    ends = tokenizer("")["input_ids"]
    tail = tokenizer(" It was", add_special_tokens=False)["input_ids"] + (ends[-1:] if len(ends) == 2 else [])
    long = ["good bad " * 40, "dull, très dull \U0001f3ac " * 20, "x" * 300 + " good", "good " + "\n \t" * 100 + "bad"]
    for text in long:
        ids = encoder.encode(text)
        assert len(ids) <= limit
        assert ids[-len(tail) :] == tail
    if kind == "words":
        kept = " ".join((["good", "bad"] * 40)[: limit - 5])
        assert encoder.encode(long[0]) == tokenizer(f"the film : {kept} It was")["input_ids"]


def test_each_text_is_counted_once(words: Any) -> None:
    encoder = PromptEncoder(words, TEMPLATE.replace("{text}", "{}").format, 8)
    fits = "good " * 6
    assert encoder.encode(fits) == words(f"{fits} It was")["input_ids"]
    assert encoder.truncated == 0
    for text in ("good " * 7, "bad " * 9, "good " * 7):
        encoder.encode(text)
    assert encoder.truncated == 2
    # Cut from the end: the first words stay.
    assert encoder.encode("good " * 7) == encoder.encode(fits)


def test_a_template_that_leaves_no_room(words: Any) -> None:
    with pytest.raises(ConfigError, match="takes 2 of 2 tokens"):
        PromptEncoder(words, lambda text: f"{text} It was", 2)
    assert len(PromptEncoder(words, lambda text: f"{text} It was", 3).encode("good bad")) == 3


# Causal LMs


def log_likelihoods(model: nn.Module, tokenizer: Any, text: str, answers: tuple[str, ...]) -> Tensor:
    """Each answer's summed log-probability, one sequence at a time."""
    prompt = tokenizer(f"{text} It was")["input_ids"]
    sums = []
    for answer in answers:
        option = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([prompt + option])).logits[0].double(), dim=-1)
        sums.append(sum(found[len(prompt) + k - 1, token] for k, token in enumerate(option)))
    return torch.stack(sums)


def settle(scorer: Scorer, model: nn.Module) -> None:
    def call(function: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = function(model.eval(), batch)
        return found

    scorer.settle(model, call, EXAMPLES, torch.device("cpu"))


def pack(scorer: Scorer, model: nn.Module) -> None:
    """All sequences in one row from now on, if the model takes that."""
    settle(scorer, model)
    assert scorer.packing is not None
    scorer.packing = replace(scorer.packing, rows=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("answers", [("bad", "good"), ("bad", "very good indeed", "dull !")])
def test_answers_of_a_causal_lm(family: str, answers: tuple[str, ...], packed: bool, pieces: Any) -> None:
    model = causal(family, len(pieces))
    scorer = OptionLikelihood(Task(TEMPLATE, answers), pieces, 64)
    if packed:
        pack(scorer, model)
    batch = scorer.encode(EXAMPLES)
    lengths = {len(pieces(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers}
    rows = len(EXAMPLES) * (1 if lengths == {1} else len(answers))
    assert sum(len(asked.inputs["input_ids"]) for asked in batch.asked) == (1 if packed else rows)
    assert lengths == {1} or len(lengths) > 1
    if packed:
        # A prompt is there once, whatever its answers, and nothing is padded.
        extra = 0 if lengths == {1} else sum(len(option) - 1 for option in scorer._options)
        wanted = sum(scorer.length(example) + extra for example in EXAMPLES)
        assert batch.asked[0].inputs["input_ids"].numel() == wanted
    with torch.no_grad():
        scores, loss = scorer.scores(model, batch), scorer.loss(model, batch)
    expected = torch.stack([log_likelihoods(model, pieces, text, answers) for text in TEXTS])
    if lengths == {1}:
        torch.testing.assert_close(scores.log_softmax(-1), expected.log_softmax(-1).float(), atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(scores, expected.float(), atol=1e-4, rtol=1e-5)
    right = torch.tensor([example.label for example in EXAMPLES])
    torch.testing.assert_close(loss, -expected.log_softmax(-1).float()[range(4), right], atol=1e-4, rtol=1e-5)
    assert expected.std(0).min() > 1e-2


def test_answers_fit_behind_a_cut_prompt(pieces: Any) -> None:
    scorer = OptionLikelihood(Task(TEMPLATE, ("bad", "very good indeed")), pieces, 30)
    assert scorer.encode([Example("good " * 60, 1)]).asked[0].inputs["input_ids"].shape[1] <= 30
    assert scorer.prompts.truncated == 1


@pytest.mark.parametrize("answers", [("marvellous", "awful"), ("marvellous", "awful", "bad")])
def test_answers_that_are_the_same_token(words: Any, answers: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="same token"):
        OptionLikelihood(Task(TEMPLATE, answers), words, 32)


def test_answers_that_are_the_same_tokens(words: Any) -> None:
    """Neither can ever win: both words of each are unknown."""
    with pytest.raises(ConfigError, match="same token"):
        OptionLikelihood(Task(TEMPLATE, ("truly marvellous", "really awful")), words, 32)


# Masked LMs and heads


def masked(family: str, vocabulary: int) -> nn.Module:
    if family == "bert":
        return randomised(BertForMaskedLM(BertConfig(vocab_size=vocabulary, **ENCODER)))
    return randomised(RobertaForMaskedLM(RobertaConfig(vocab_size=vocabulary, **ENCODER)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_words_at_the_mask(family: str, packed: bool, masking: Any) -> None:
    model = masked(family, len(masking))
    texts = [*TEXTS, "a <mask> film , <mask> <mask>", "{mask} {text}"]
    scorer = LabelWords(Task(MASKED, ("terrible", "great")), masking, 32)
    if packed:
        pack(scorer, model)
        assert scorer.packing is not None
        assert scorer.packing.first_position == (0 if family == "bert" else masking.pad_token_id + 1)
    with torch.no_grad():
        scores = scorer.scores(model, scorer.encode([Example(text, 0) for text in texts]))
    options = masking.convert_tokens_to_ids(["terrible", "great"])
    for text, found in zip(texts, scores, strict=True):
        ids = masking(f"{text.replace('<mask>', ' ')} It was <mask> .")["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, ids.index(masking.mask_token_id), options]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("template", [TEMPLATE, "{text} It was <mask>"])
def test_masks_in_a_template(template: str, masking: Any) -> None:
    with pytest.raises(ConfigError, match="mask"):
        LabelWords(Task(template, ("terrible", "great")), masking, 32)


def test_two_masks_in_a_template(masking: Any) -> None:
    with pytest.raises(ConfigError, match="mask"):
        LabelWords(Task("{mask} {text} {mask}", ("terrible", "great")), masking, 32)


def test_a_masked_task_needs_a_mask_token_and_known_words(words: Any, masking: Any) -> None:
    with pytest.raises(ConfigError, match="no mask token"):
        LabelWords(Task(MASKED, ("terrible", "great")), words, 32)
    with pytest.raises(ConfigError, match="'marvellous' is not one token"):
        LabelWords(Task(MASKED, ("terrible", "marvellous")), masking, 32)


def test_masked_words_that_are_the_same_token(masking: Any) -> None:
    with pytest.raises(ConfigError, match="same token"):
        LabelWords(Task(MASKED, ("great", "Great")), masking, 32)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_classification_head(family: str, masking: Any) -> None:
    size = {"vocab_size": len(masking), "num_labels": 3}
    model = randomised(
        BertForSequenceClassification(BertConfig(**ENCODER, **size))
        if family == "bert"
        else GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **size))
    )
    scorer = Head(Task("{text}", ("a", "b", "c")), masking, 32)
    with torch.no_grad():
        scores = scorer.scores(model, scorer.encode(EXAMPLES))
        expected = torch.cat([model(**masking(text, return_tensors="pt")).logits for text in TEXTS])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


class Deaf(nn.Module):
    """Takes whatever a model takes, and leaves out what it is told about rows."""

    def __init__(self, model: nn.Module, ignored: str) -> None:
        super().__init__()
        self.inner, self.config, self.ignored = model, model.config, ignored

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**{key: value for key, value in inputs.items() if key != self.ignored})


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_models_that_do_not_take_packed_rows_get_padded_ones(ignored: str, pieces: Any) -> None:
    model = Deaf(causal("gpt2", len(pieces)), ignored)
    scorer = OptionLikelihood(Task(TEMPLATE, ("bad", "good")), pieces, 64)
    settle(scorer, model)
    assert scorer.packing is None


def test_sequences_longer_than_the_models_window_are_padded(pieces: Any) -> None:
    model = causal("llama", len(pieces))
    scorer = OptionLikelihood(Task(TEMPLATE, ("bad", "good")), pieces, 64)
    pack(scorer, model)
    longest = max(map(scorer.length, EXAMPLES))
    for window, rows in ((longest, 1), (longest - 1, len(EXAMPLES))):
        scorer.packing = replace(scorer.packing, window=window)
        assert len(scorer.encode(EXAMPLES).asked[0].inputs["input_ids"]) == rows


def test_a_scorer_for_every_head() -> None:
    assert {"causal_lm": OptionLikelihood, "masked_lm": LabelWords, "sequence_classification": Head} == SCORERS
