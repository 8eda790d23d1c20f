"""What every way of asking a model has in common: encode examples, score answers, lose, grade."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError
from zo_ds.tasks.batch import Batch
from zo_ds.tasks.layout import Prompt
from zo_ds.tasks.objectives import ScoreLoss, cross_entropy
from zo_ds.tasks.packing import Packing
from zo_ds.tasks.prompts import PromptEncoder, Tokenizer
from zo_ds.tasks.task import Task

Call = Callable[[Callable[[nn.Module, Batch], Tensor], Batch], Tensor]
"""Runs a function of (model, batch) without gradients, e.g. `ZOEngine.call`."""


class Scorer(ABC):
    """Encodes examples and scores their options.

    Args:
        task: what is asked.
        tokenizer: of the model.
        max_tokens: the model's limit, or the recipe's if that is lower.
        objective: from scores and labels to what is lowered.

    Attributes:
        columns: what `grade` gives, the first is what counts; the loss is always among them.
        packing: how sequences may share a row; None pads them.
        prompts: encodes and counts.
        lockstep: every batch must take as many calls of the model, since ranks hold its shards for each other.
    """

    columns: tuple[str, ...] = ("accuracy", "loss")
    lockstep = False

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, objective: ScoreLoss = cross_entropy) -> None:
        self._task, self._tokenizer, self._objective = task, tokenizer, objective
        self.packing: Packing | None = None
        self.prompts = PromptEncoder(tokenizer, max_tokens)
        # Padding is masked, so any token will do.
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id: int = next(token for token in known if token is not None)

    def length(self, example: Example) -> int:
        """Tokens of an example's prompt."""
        return len(self.prompts.encode(example))

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> Batch:
        """A batch on the CPU."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [examples, options], -inf for an option that an example does not have."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a step lowers, fp32 [examples]."""
        return self._objective(self.scores(model, batch), batch.labels)

    def grade(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp64 [examples, columns] on the CPU: whether the best option is the right one, and the cross-entropy."""
        scores = self.scores(model, batch)
        return torch.stack((is_right(scores, batch), cross_entropy(scores, batch.labels).double()), dim=1).cpu()

    def preview(self, example: Example) -> str:
        """For people: the prompt as the model gets it, and what the loss sees of the answer."""
        ids = self.prompts.encode(example)
        lines = [f"prompt ({len(ids)} tokens): {self._tokenizer.decode(ids)!r}"]
        for number, option in enumerate(example.options):
            right = number == example.label or option in example.answers
            lines.append(f"{'right' if right else 'wrong'} option: {option!r}")
        return "\n".join(lines)

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """Ways of packing that may suit a model; none for those that need a row for each sequence."""
        return ()

    def settle(
        self,
        module: nn.Module,
        call: Call,
        examples: Sequence[Example],
        device: torch.device,
        *,
        lockstep: bool = False,
    ) -> None:
        """Pack sequences from now on if this model then gives them the same scores as in rows of their own.

        Args:
            module: the model.
            call: runs a function of (model, batch).
            examples: a few to try.
            device: where the model runs.
            lockstep: see the attribute.
        """
        self.lockstep = lockstep

        def scores() -> Tensor:
            found = call(self.scores, self.encode(examples).to(device))
            return found[found.isfinite()]

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


def is_right(scores: Tensor, batch: Batch) -> Tensor:
    """fp64 [examples]: whether the best option is the right one, or one that counts as right. Ties go to the first."""
    best = scores.argmax(-1)
    right = best == batch.labels
    if batch.accepted.numel():
        right = right | batch.accepted.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    return right.double()


def continuation(tokenizer: Tokenizer, prompt_end: str, option: str) -> list[int]:
    """Tokens that an option adds to a prompt.

    Args:
        tokenizer: of the model.
        prompt_end: the template behind the text; what stands there may melt into the option's first token.
        option: with what joins it to the prompt.
    """
    prompt = f"Text.{prompt_end}"
    before: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after: list[int] = tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before and len(after) > len(before):
        return after[len(before) :]
    alone: list[int] = tokenizer(option, add_special_tokens=False)["input_ids"]
    return alone


def check_different(answers: Sequence[Sequence[int]], words: Sequence[str]) -> None:
    """Refuse label words that a model cannot tell apart.

    Raises:
        ConfigError: two are the same tokens.
    """
    if len({tuple(answer) for answer in answers}) < len(answers):
        raise ConfigError(
            "two label words are the same tokens for this model",
            where=f"task.label_words = {list(words)}",
            remedy="choose words that the tokenizer tells apart",
        )


def first_token(tokenizer: Tokenizer) -> int:
    """A token to begin with where a prompt has none: models need one to predict the next from."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return int(next(token for token in known if token is not None))
