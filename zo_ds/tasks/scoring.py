"""Scores of the classes of a text, by the kind of model: answers of a causal LM, words at a mask, or a head."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError
from zo_ds.tasks.prompts import PromptEncoder, Tokenizer, pad
from zo_ds.tasks.registry import Task

Batch = dict[str, Tensor]


class Scorer(ABC):
    """Encodes examples and scores their classes.

    Args:
        task: template and label words.
        tokenizer: of the model.
        max_tokens: the model's limit, or the recipe's if that is lower.
    """

    pad_left = False

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._task, self._tokenizer = task, tokenizer
        self.prompts = PromptEncoder(tokenizer, self._render, max_tokens - self._answer_tokens())
        # Padding is masked, so any token will do.
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id: int = next(token for token in known if token is not None)

    def length(self, example: Example) -> int:
        """Tokens of an example's prompt."""
        return len(self.prompts.encode(example.text))

    def encode(self, examples: Sequence[Example]) -> Batch:
        """A batch on the CPU: tensors whose first axis is a multiple of the number of examples, and their labels."""
        rows = [row for example in examples for row in self._rows(example)]
        ids, mask = pad(rows, self._pad_id, left=self.pad_left)
        labels = torch.tensor([example.label for example in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [examples, classes]; the differences between classes are log-odds."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy over the classes, fp32 [examples]."""
        return nn.functional.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def _render(self, text: str) -> str:
        return self._task.template.replace("{text}", text)

    def _rows(self, example: Example) -> list[list[int]]:
        return [self.prompts.encode(example.text)]

    def _answer_tokens(self) -> int:
        return 0


class OptionLikelihood(Scorer):
    """Causal LM: the log-likelihood of each label word as the continuation of the prompt.

    Words of one token each share one pass over the prompt; otherwise every (prompt, word) pair is a sequence.
    """

    pad_left = True

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._options = [_continuation(tokenizer, task, word) for word in task.label_words]
        self._single = all(len(option) == 1 for option in self._options)
        _check_different(self._options, task)
        super().__init__(task, tokenizer, max_tokens)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`. Only the positions that predict an answer reach the head."""
        width = 1 if self._single else max(map(len, self._options)) + 1
        logits = _tail_logits(model, batch, width)
        if self._single:
            words = torch.tensor([option[0] for option in self._options], device=logits.device)
            return logits[:, -1].float().index_select(-1, words)
        predicted = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        targets = batch["input_ids"][:, 1 - width :]
        each = predicted.gather(-1, targets.unsqueeze(-1)).squeeze(-1).view(-1, len(self._options), width - 1)
        places = torch.arange(width - 1, 0, -1, device=each.device)
        lengths = torch.tensor([len(option) for option in self._options], device=each.device)
        total: Tensor = (each * (places <= lengths.unsqueeze(1))).sum(-1)
        return total

    def _rows(self, example: Example) -> list[list[int]]:
        prompt = self.prompts.encode(example.text)
        return [prompt] if self._single else [prompt + option for option in self._options]

    def _answer_tokens(self) -> int:
        return 0 if self._single else max(map(len, self._options))


class LabelWords(Scorer):
    """Masked LM: the logit of each label word at the mask."""

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int) -> None:
        if task.template.count("{mask}") != 1 or tokenizer.mask_token is None:
            raise ConfigError(
                "a masked LM is asked through one mask, and this one cannot be",
                where=f"task.template = {task.template!r}",
                why=f"the template has {task.template.count('{mask}')} '{{mask}}'"
                if tokenizer.mask_token
                else "the tokenizer has no mask token",
                remedy='for example template: "{text} It was {mask}."',
            )
        self._words = [_word_token(tokenizer, word) for word in task.label_words]
        _check_different([[word] for word in self._words], task)
        super().__init__(task, tokenizer, max_tokens)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        at_mask = logits[batch["input_ids"] == self._tokenizer.mask_token_id].float()
        scores: Tensor = at_mask.index_select(-1, torch.tensor(self._words, device=logits.device))
        return scores

    def _render(self, text: str) -> str:
        mask = self._tokenizer.mask_token
        return self._task.template.replace("{mask}", mask).replace("{text}", text.replace(mask, " "))


class Head(Scorer):
    """Encoder or decoder with a classification head."""

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`."""
        config = getattr(model, "config", None)
        if config is not None and config.pad_token_id is None:
            # Decoders find the last token of a row by it.
            config.pad_token_id = self._pad_id
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.float()


SCORERS: dict[str, type[Scorer]] = {
    "causal_lm": OptionLikelihood,
    "masked_lm": LabelWords,
    "sequence_classification": Head,
}


def _tail_logits(model: nn.Module, batch: Batch, width: int) -> Tensor:
    """Logits of the last `width` positions of left-padded rows, [rows, width, vocabulary]."""
    mask = batch["attention_mask"]
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in known:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = width
    if "use_cache" in known:
        extra["use_cache"] = False
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=mask, **extra).logits
    return logits[:, -width:]


def _continuation(tokenizer: Tokenizer, task: Task, word: str) -> list[int]:
    """Tokens that the word adds to a prompt."""
    prompt = task.template.replace("{text}", "Text.")
    joint = "" if prompt[-1:].isspace() else " "
    before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after: list[int] = tokenizer(prompt + joint + word, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before and len(after) > len(before):
        return after[len(before) :]
    alone: list[int] = tokenizer(joint + word, add_special_tokens=False)["input_ids"]
    return alone


def _check_different(answers: Sequence[Sequence[int]], task: Task) -> None:
    if len({tuple(answer) for answer in answers}) < len(answers):
        raise ConfigError(
            "two label words are the same tokens for this model",
            where=f"task.label_words = {list(task.label_words)}",
            remedy="choose words that the tokenizer tells apart",
        )


def _word_token(tokenizer: Tokenizer, word: str) -> int:
    # Byte-level vocabularies (RoBERTa) hold a word with its space, WordPiece ones (BERT) without.
    for form in (" " + word, word):
        ids = tokenizer(form, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    raise ConfigError(
        f"the label word {word!r} is not one token of this model",
        where="task.label_words",
        why="a mask stands for exactly one token",
        remedy="choose a commoner word",
    )
