"""A causal LM writes its answer; what it wrote is held against accepted answers, or judged by the user's function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.errors import DataError
from zo_ds.tasks.batch import Pair
from zo_ds.tasks.decoding import Prompts, greedy, pad_left
from zo_ds.tasks.likelihood import AnswerLikelihood
from zo_ds.tasks.metrics import squad_exact, squad_f1
from zo_ds.tasks.prompts import Tokenizer
from zo_ds.tasks.reward import Reward
from zo_ds.tasks.scorer import Call, Scorer, first_token
from zo_ds.tasks.task import Task


class Generator(Scorer):
    """Scores the text that a causal LM writes, greedily, up to a line break: token F1, or the user's reward.

    Args:
        task: `max_new_tokens` and `objective`.
        tokenizer: of the model.
        max_tokens: the model's limit.
        reward: judges what was written; None: token F1 against the accepted answers.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, reward: Reward | None = None) -> None:
        super().__init__(task, tokenizer, max_tokens)
        self._reward = reward
        self.columns = ("reward", "loss") if reward else ("f1", "exact_match", "loss")
        self._examples: list[Example] = []
        self._numbers: dict[Example, int] = {}
        line_break: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self._stops = [token for token in (tokenizer.eos_token_id, *line_break[-1:]) if token is not None]

    def length(self, example: Example) -> int:
        """Tokens of the prompt."""
        return len(self._prompt(example))

    def encode(self, examples: Sequence[Example]) -> Any:
        """`Prompts` on the CPU."""
        numbers = []
        for example in examples:
            if example not in self._numbers:
                self._numbers[example] = len(self._examples)
                self._examples.append(example)
            numbers.append(self._numbers[example])
        return pad_left([self._prompt(example) for example in examples], numbers, self._pad_id)

    def texts(self, model: nn.Module, prompts: Prompts) -> list[str]:
        """What the model writes to each prompt, without what follows the first line."""
        written = greedy(model, prompts, self._task.max_new_tokens, self._stops, lockstep=self.lockstep)
        decoded: list[str] = self._tokenizer.batch_decode(written.cpu(), skip_special_tokens=True)
        return [text.split("\n", 1)[0].strip() for text in decoded]

    def scores(self, model: nn.Module, batch: Any) -> Tensor:
        """fp32 [examples, 1]: F1 from 0 to 1, or the reward."""
        worth = self._worth(self.texts(model, batch), self._asked(batch))
        return torch.tensor(worth, dtype=torch.float32).unsqueeze(1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """1 - F1, or the negative of the reward, fp32 [examples]."""
        worth = self.scores(model, batch)[:, 0]
        return 1 - worth if self._reward is None else -worth

    def grade(self, model: nn.Module, batch: Any) -> Tensor:
        """fp64 [examples, columns]; the loss is what a step would lower."""
        texts, asked = self.texts(model, batch), self._asked(batch)
        worth = torch.tensor(self._worth(texts, asked), dtype=torch.float64)
        if self._reward is not None:
            return torch.stack([worth, -worth], dim=1)
        exact = [squad_exact(text, example.answers) for text, example in zip(texts, asked, strict=True)]
        return torch.stack([worth, torch.tensor(exact, dtype=torch.float64), 1 - worth], dim=1)

    def preview(self, example: Example) -> str:
        """See `Scorer.preview`."""
        ids = self._prompt(example)
        judged = "the reward function" if self._reward else f"F1 against {list(example.answers)!r}"
        limit = self._task.max_new_tokens
        return (
            f"prompt ({len(ids)} tokens): {self._tokenizer.decode(ids)!r}\n"
            f"generated: up to {limit} tokens, to the end of a line, judged by {judged}"
        )

    def _prompt(self, example: Example) -> list[int]:
        return self.prompts.encode(example, self._task.max_new_tokens) or [first_token(self._tokenizer)]

    def _asked(self, prompts: Prompts) -> list[Example]:
        return [self._examples[number] for number in prompts.numbers.tolist()]

    def _worth(self, texts: Sequence[str], asked: Sequence[Example]) -> list[float]:
        pairs = zip(texts, asked, strict=True)
        if self._reward is None:
            return [squad_f1(text, example.answers) for text, example in pairs]
        return [self._judged(self._reward, text, example) for text, example in pairs]

    def _judged(self, reward: Reward, text: str, example: Example) -> float:
        try:
            found = float(reward(example.prompt, text, example.answers))
        except Exception as error:  # the user's own code
            raise DataError(
                f"the reward function failed: {type(error).__name__}: {error}",
                where=example.where,
                why=f"the generated text was {text!r}",
                remedy="let it return a number for any text, also an empty one",
            ) from error
        if not math.isfinite(found):
            raise DataError(
                f"the reward function returned {found}",
                where=example.where,
                why=f"the generated text was {text!r}",
                remedy="let it return a finite number for any text",
            )
        return found


class GenerationJudge(Generator):
    """Grades generated answers, with the likelihood of the published answer as the loss beside them."""

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, reward: Reward | None = None) -> None:
        super().__init__(task, tokenizer, max_tokens, reward)
        self._answers = AnswerLikelihood(task, tokenizer, max_tokens)

    def encode(self, examples: Sequence[Example]) -> Any:
        """Prompts, and prompts with their answers."""
        return Pair(super().encode(examples), self._answers.encode(examples))

    def grade(self, model: nn.Module, batch: Any) -> Tensor:
        """fp64 [examples, columns] on the CPU."""
        found = super().grade(model, batch.first)
        return torch.cat([found[:, :-1], self._answers.grade(model, batch.second)], dim=1)

    def settle(
        self,
        module: nn.Module,
        call: Call,
        examples: Sequence[Example],
        device: torch.device,
        *,
        lockstep: bool = False,
    ) -> None:
        """See `Scorer.settle`."""
        self.lockstep = lockstep
        self._answers.settle(module, call, examples, device, lockstep=lockstep)
