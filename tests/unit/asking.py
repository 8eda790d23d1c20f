"""Small tokenizers and random models, and what tasks are asked of them for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.launch import jobs
from zo_ds.config.schema import TaskConfig
from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.tasks.registry import resolve_task
from zo_ds.tasks.scorer import Scorer
from zo_ds.tasks.task import Task

TEMPLATE = "{text} It was"
TEXTS = ["the film is bad", "good", "a dull plot , not very bright", "the the cast is great text"]
SPECIAL = ["<pad>", "<unk>", "</s>", "<s>", "<mask>"]
SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def classification(template: str, words: Sequence[str], **settings: Any) -> Task:
    """A task of one's own."""
    return resolve_task(TaskConfig(template=template, label_words=tuple(words), **settings))


def read(task: Task, *rows: dict[str, Any]) -> list[Example]:
    """The examples of some rows, which lie in rows.jsonl."""
    return [example for n, row in enumerate(rows, start=1) for example in task.read(Row(row, f"rows.jsonl:{n}"))]


def labelled(task: Task, texts: Sequence[str] = tuple(TEXTS)) -> list[Example]:
    """Examples of a classification task with two classes in turn."""
    return read(task, *({"text": text, "label": number % 2} for number, text in enumerate(texts)))


@cache
def word_tokens() -> Any:
    """One token for each of a few words; no special token is added to a text."""
    with tempfile.TemporaryDirectory() as folder:
        return AutoTokenizer.from_pretrained(jobs.make_model(Path(folder)))


@cache
def byte_pairs() -> Any:
    """Byte-level BPE in which only a few words are one token, with a token before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([f"{text} It was bad good good" for text in TEXTS] * 3, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@cache
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


TOKENIZERS = {"words": word_tokens, "pieces": byte_pairs, "masking": masking}


def randomised(model: nn.Module, scale: float = 0.4) -> nn.Module:
    """Weights large enough that every position and token matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scales = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + scales)
    return model.eval()


def causal(family: str, vocabulary: int, positions: int = 64) -> nn.Module:
    """A causal LM with the same weights every time."""
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    size = {**SIZE, **ends, "vocab_size": vocabulary, "max_position_embeddings": positions}
    if family == "llama":
        return randomised(LlamaForCausalLM(LlamaConfig(**size, intermediate_size=24)))
    if family == "opt":
        return randomised(OPTForCausalLM(OPTConfig(**size, ffn_dim=24, word_embed_proj_dim=16)))
    narrow = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
    return randomised(GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **ends, **narrow)))


def log_probabilities(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """fp64 [tokens, vocabulary] of one sequence without padding: what follows each token."""
    with torch.no_grad():
        found: Tensor = model(torch.tensor([list(ids)])).logits[0].double()
    return found.log_softmax(-1)


def log_likelihood(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Summed log-probability of an answer's tokens behind a prompt, fp64."""
    found = log_probabilities(model, [*prompt, *answer])
    return torch.stack([found[len(prompt) + k - 1, token] for k, token in enumerate(answer)]).sum()


def no_gradients(model: nn.Module) -> Any:
    """Calls a function of (model, batch) as an engine does."""

    def call(function: Any, batch: Any) -> Tensor:
        with torch.inference_mode():
            found: Tensor = function(model.eval(), batch)
        return found

    return call


def scores_of(scorer: Scorer, model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """What a scorer gives a batch."""
    found: Tensor = no_gradients(model)(scorer.scores, scorer.encode(examples))
    return found


def pack(scorer: Scorer, model: nn.Module, examples: Sequence[Example]) -> None:
    """All sequences in one row from now on, if the model takes that."""
    scorer.settle(model, no_gradients(model), examples, torch.device("cpu"))
    assert scorer.packing is not None
    scorer.packing = replace(scorer.packing, rows=1)
