"""Scores of the classes of a text, by the kind of model: answers of a causal LM, words at a mask, or a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError
from zo_ds.forward.head import logits_at
from zo_ds.tasks.layout import Layout, Part, Prompt, packed, padded
from zo_ds.tasks.packing import Packing
from zo_ds.tasks.prompts import PromptEncoder, Tokenizer
from zo_ds.tasks.registry import Task


class Asked(NamedTuple):
    """One call of the model, and where its answers stand.

    Attributes:
        inputs: the model's.
        rows, columns: [answers], positions whose logits are wanted.
        slots: [answers], which question each of them answers.
    """

    inputs: Part
    rows: Tensor
    columns: Tensor
    slots: Tensor


class Batch(NamedTuple):
    """Encoded examples.

    Attributes:
        asked: the calls of the model that they take.
        labels: int64 [examples].
        targets: [slots], token ids whose likelihood is asked for; empty where that is not the question.
    """

    asked: list[Asked]
    labels: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved: Batch = tree_map(lambda leaf: leaf.to(device), self)
        return moved


class Scorer(ABC):
    """Encodes examples and scores their classes.

    Args:
        task: template and label words.
        tokenizer: of the model.
        max_tokens: the model's limit, or the recipe's if that is lower.

    Attributes:
        packing: how sequences may share a row; None pads them.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._task, self._tokenizer = task, tokenizer
        self.packing: Packing | None = None
        self.prompts = PromptEncoder(tokenizer, self._render, max_tokens - self._answer_tokens())
        # Padding is masked, so any token will do.
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id: int = next(token for token in known if token is not None)

    def length(self, example: Example) -> int:
        """Tokens of an example's prompt."""
        return len(self.prompts.encode(example.text))

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> Batch:
        """A batch on the CPU."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [examples, classes]; the differences between classes are log-odds."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy over the classes, fp32 [examples]."""
        return nn.functional.cross_entropy(self.scores(model, batch), batch.labels, reduction="none")

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """Ways of packing that may suit a model; none for those that need a row for each sequence."""
        return ()

    def settle(
        self,
        module: nn.Module,
        call: Callable[[Callable[[nn.Module, Batch], Tensor], Batch], Tensor],
        examples: Sequence[Example],
        device: torch.device,
    ) -> None:
        """Pack sequences from now on if this model then gives them the same scores as in rows of their own.

        Args:
            module: the model.
            call: runs a function of (model, batch) without gradients, e.g. `ZOEngine.call`.
            examples: a few to try.
            device: where the model runs.
        """

        def scores() -> Tensor:
            return call(self.scores, self.encode(examples).to(device))

        self.packing = None
        candidates = self.packings(module)
        alone = scores() if candidates else torch.empty(0)
        lengths = [Prompt((0,) * self.length(example)) for example in examples]
        for candidate in candidates:
            self.packing = replace(candidate, rows=1)
            if candidate.takes(lengths) and candidate.gives(alone, scores):
                self.packing = candidate
                return
        self.packing = None

    def _render(self, text: str) -> str:
        return self._task.template.replace("{text}", text)

    def _answer_tokens(self) -> int:
        return 0


class OptionLikelihood(Scorer):
    """Causal LM: the log-likelihood of each label word as the continuation of the prompt.

    Where sequences can be packed, the words of a prompt share its computation; else so do words of one token, and every
    other (prompt, word) pair is a sequence.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._options = [_continuation(tokenizer, task, word) for word in task.label_words]
        self._single = all(len(option) == 1 for option in self._options)
        # Tokens after the first are predicted from those before them; the last is never an input.
        self._branches = tuple(tuple(option[:-1]) for option in self._options)
        self._longest = max(map(len, self._options))
        _check_different(self._options, task)
        super().__init__(task, tokenizer, max_tokens)

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        stems = [tuple(self.prompts.encode(example.text)) for example in examples]
        labels = torch.tensor([example.label for example in examples])
        if self._single:
            answers = [(number, len(stem) - 1, number) for number, stem in enumerate(stems)]
            return Batch(self._ask([Prompt(stem) for stem in stems], answers), labels, torch.empty(0))
        prompts = [Prompt(stem, self._branches) for stem in stems]
        shared = self.packing is not None and self.packing.takes(prompts)
        if not shared:
            prompts = [Prompt(stem + branch) for stem in stems for branch in self._branches]
        answers, targets = [], torch.zeros(len(stems) * len(self._options) * self._longest, dtype=torch.int64)
        for number, stem in enumerate(stems):
            for word, option in enumerate(self._options):
                for token, target in enumerate(option):
                    slot = (number * len(self._options) + word) * self._longest + token
                    targets[slot] = target
                    if shared:
                        answers.append((number, prompts[number].place(word, token - 1), slot))
                    else:
                        answers.append((number * len(self._options) + word, len(stem) - 1 + token, slot))
        return Batch(self._ask(prompts, answers), labels, targets)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`. Only the positions that predict an answer reach the head."""
        if self._single:
            words = [option[0] for option in self._options]
            return _in_order(batch, [_logits(model, asked)[:, words] for asked in batch.asked])
        places = batch.labels.numel() * len(self._options) * self._longest
        total = torch.zeros(places, dtype=torch.float32, device=batch.labels.device)
        for asked in batch.asked:
            each = torch.log_softmax(_logits(model, asked), dim=-1)
            total[asked.slots] = each.gather(-1, batch.targets[asked.slots].unsqueeze(-1)).squeeze(-1)
        return total.view(-1, len(self._options), self._longest).sum(-1)

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """See `Scorer.packings`."""
        return [Packing.of(module, causal=True)]

    def _ask(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, int, int]]) -> list[Asked]:
        return _ask(_lay_out(prompts, self._pad_id, self.packing), answers)

    def _answer_tokens(self) -> int:
        return max(map(len, self._options)) - 1


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

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        prompts = [Prompt(tuple(self.prompts.encode(example.text))) for example in examples]
        mask = self._tokenizer.mask_token_id
        answers = [(number, prompt.stem.index(mask), number) for number, prompt in enumerate(prompts)]
        labels = torch.tensor([example.label for example in examples])
        return Batch(_ask(_lay_out(prompts, self._pad_id, self.packing), answers), labels, torch.empty(0))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`. Only the masks reach the head."""
        return _in_order(batch, [_logits(model, asked)[:, self._words] for asked in batch.asked])

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """See `Scorer.packings`."""
        # RoBERTa counts positions from behind its padding token.
        first = (0, (self._tokenizer.pad_token_id or 0) + 1)
        return [Packing.of(module, causal=False, first_position=position) for position in first]

    def _render(self, text: str) -> str:
        mask = self._tokenizer.mask_token
        return self._task.template.replace("{mask}", mask).replace("{text}", text.replace(mask, " "))


class Head(Scorer):
    """Encoder or decoder with a classification head, which looks for the end or the start of a row: never packed."""

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        rows = [self.prompts.encode(example.text) for example in examples]
        layout = padded(rows, self._pad_id)
        labels = torch.tensor([example.label for example in examples])
        return Batch(_ask(layout, [(number, 0, number) for number in range(len(rows))]), labels, torch.empty(0))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`."""
        config: Any = getattr(model, "config", None)
        if config is not None and config.pad_token_id is None:
            # Decoders find the last token of a row by it.
            config.pad_token_id = self._pad_id
        return _in_order(batch, [model(**asked.inputs).logits[asked.rows].float() for asked in batch.asked])


SCORERS: dict[str, type[Scorer]] = {
    "causal_lm": OptionLikelihood,
    "masked_lm": LabelWords,
    "sequence_classification": Head,
}


def _lay_out(prompts: Sequence[Prompt], pad_id: int, packing: Packing | None) -> Layout:
    if packing is not None and packing.takes(prompts):
        return packed(
            prompts,
            pad_id,
            causal=packing.causal,
            hidden_size=packing.hidden_size,
            first_position=packing.first_position,
            rows=packing.rows,
        )
    return padded([prompt.stem for prompt in prompts], pad_id)


def _ask(layout: Layout, answers: Sequence[tuple[int, int, int]]) -> list[Asked]:
    """Calls of the model, with the answers given as (sequence, its token, slot)."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in layout.parts]
    for sequence, token, slot in answers:
        part, row, column = layout.places[sequence]
        found[part].append((row, column + token, slot))
    return [Asked(inputs, *torch.tensor(places).unbind(1)) for inputs, places in zip(layout.parts, found, strict=True)]


def _logits(model: nn.Module, asked: Asked) -> Tensor:
    """fp32 [answers, vocabulary]."""
    return logits_at(model, asked.inputs, asked.rows, asked.columns).float()


def _in_order(batch: Batch, scores: Sequence[Tensor]) -> Tensor:
    """Scores of every call's answers, in the order of their slots."""
    slots = torch.cat([asked.slots for asked in batch.asked])
    return torch.cat(list(scores))[slots.argsort()]


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
