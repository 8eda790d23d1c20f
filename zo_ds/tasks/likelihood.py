"""Texts to be learned rather than chosen: the mean negative log-likelihood of the tokens that count."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.batch import Batch, ask, lay_out, log_likelihoods
from zo_ds.tasks.layout import Prompt
from zo_ds.tasks.objectives import ScoreLoss, negative_mean
from zo_ds.tasks.packing import Packing
from zo_ds.tasks.prompts import Tokenizer
from zo_ds.tasks.scorer import Scorer, continuation, first_token
from zo_ds.tasks.task import Task


class Likelihood(Scorer):
    """Causal LM: the score of an example is the mean log-likelihood of those of its tokens that are to be learned."""

    columns = ("loss",)

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, objective: ScoreLoss = negative_mean) -> None:
        super().__init__(task, tokenizer, max_tokens, objective)
        self._spans: dict[Example, tuple[list[int], list[int]]] = {}

    @abstractmethod
    def spans(self, example: Example) -> tuple[list[int], list[int]]:
        """(token ids, positions of those that are to be learned); position 0 cannot be."""

    def known_spans(self, example: Example) -> tuple[list[int], list[int]]:
        """`spans`, computed once for each example.

        Raises:
            DataError: nothing is left to learn within the limit.
        """
        if example not in self._spans:
            ids, learned = self.spans(example)
            if not learned:
                raise DataError(
                    "nothing of this example can be learned",
                    where=example.where,
                    why=f"what is to be learned begins behind token {self.prompts.max_tokens}, or is one token",
                    remedy="shorten its prompt, raise data.max_length, or remove the row",
                )
            self._spans[example] = ids, learned
        return self._spans[example]

    def length(self, example: Example) -> int:
        """Tokens of the whole example."""
        return len(self.known_spans(example)[0])

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        spans = [self.known_spans(example) for example in examples]
        longest = max(len(learned) for _, learned in spans)
        targets = torch.zeros(len(spans) * longest, dtype=torch.int64)
        answers = []
        for number, (ids, learned) in enumerate(spans):
            for at, position in enumerate(learned):
                targets[number * longest + at] = ids[position]
                answers.append((number, position - 1, number * longest + at))
        # The last token is never an input.
        prompts = [Prompt(tuple(ids[:-1] if learned[-1] == len(ids) - 1 else ids)) for ids, learned in spans]
        lengths = torch.tensor([[len(learned)] for _, learned in spans])
        asked = ask(lay_out(prompts, self._pad_id, self.packing, lockstep=self.lockstep), answers)
        return Batch(asked, torch.zeros(len(spans), dtype=torch.int64), targets, lengths)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 [examples, 1]."""
        return log_likelihoods(model, batch).view(len(batch.lengths), -1).sum(-1, keepdim=True) / batch.lengths

    def grade(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp64 [examples, 1] on the CPU: the mean negative log-likelihood."""
        return -self.scores(model, batch).double().cpu()

    def preview(self, example: Example) -> str:
        """See `Scorer.preview`; what is learned stands in double brackets."""
        ids, learned = self.known_spans(example)
        parts, wanted = [], set(learned)
        for is_learned, run in groupby(range(len(ids)), key=wanted.__contains__):
            text = self._tokenizer.decode([ids[position] for position in run])
            parts.append(f"[[{text}]]" if is_learned else text)
        return f"sequence ({len(ids)} tokens, {len(learned)} learned): {''.join(parts)!r}"

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """See `Scorer.packings`."""
        return [Packing.of(module, causal=True)]


class AnswerLikelihood(Likelihood):
    """The tokens of the right option (or only answer), behind the prompt."""

    def spans(self, example: Example) -> tuple[list[int], list[int]]:
        """See `Likelihood.spans`."""
        answer = continuation(self._tokenizer, example.after, example.options[example.label])
        limit = self.prompts.max_tokens
        free = limit - max(1, len(self.prompts.encode(example)))
        # A long answer loses its end before the prompt is cut to less than half of the limit.
        kept = answer[: max(1, limit // 2, free)]
        if len(kept) < len(answer):
            self.prompts.cut.add(example)
        stem = self.prompts.encode(example, len(kept)) or [first_token(self._tokenizer)]
        return [*stem, *kept], list(range(len(stem), len(stem) + len(kept)))


class CompletionLikelihood(AnswerLikelihood):
    """The tokens of a completion, and the end of the text behind it, so that generation knows where to stop."""

    def spans(self, example: Example) -> tuple[list[int], list[int]]:
        """See `Likelihood.spans`."""
        ids, learned = super().spans(example)
        end = self._tokenizer.eos_token_id
        if end is None or ids[-1] == end or example in self.prompts.cut or len(ids) >= self.prompts.max_tokens:
            return ids, learned
        return [*ids, end], [*learned, len(ids)]


class TextLikelihood(Likelihood):
    """Every token of a text but the first, and the end of it."""

    def spans(self, example: Example) -> tuple[list[int], list[int]]:
        """See `Likelihood.spans`."""
        ids: list[int] = self._tokenizer(example.text)["input_ids"]
        end = self._tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        return self.cut(example, ids, list(range(1, len(ids))))

    def cut(self, example: Example, ids: list[int], learned: list[int]) -> tuple[list[int], list[int]]:
        """Both within the limit; what is behind it is lost, and counted."""
        limit = self.prompts.max_tokens
        if len(ids) > limit:
            self.prompts.cut.add(example)
        return ids[:limit], [position for position in learned if position < limit]


class ChatLikelihood(TextLikelihood):
    """The tokens of the assistant's messages, in the tokenizer's own chat template.

    Raises:
        ConfigError: the tokenizer has none.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, objective: ScoreLoss = negative_mean) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "this model's tokenizer has no chat template",
                where="task.name = chat",
                remedy="use an instruction-tuned model, or task.name: completion with prompts of your own",
            )
        super().__init__(task, tokenizer, max_tokens, objective)

    def spans(self, example: Example) -> tuple[list[int], list[int]]:
        """See `Likelihood.spans`.

        Raises:
            DataError: the template refuses the conversation, or writes earlier messages anew with each later one.
        """
        turns = [{"role": role, "content": content} for role, content in example.messages]
        whole, answers = self._rendered(turns, example, opened=False), list[range]()
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            begin = self._rendered(turns[:number], example, opened=True)
            end = self._rendered(turns[: number + 1], example, opened=False)
            if not (whole.startswith(begin) and whole.startswith(end)):
                raise DataError(
                    "the chat template renders an earlier message differently once there are later ones",
                    where=example.where,
                    why=f"message {number + 1} of {len(turns)}",
                    remedy="keep only one assistant's message in each conversation, or use task.name: completion",
                )
            answers.append(range(len(begin), len(end)))
        found = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        # A token across a border, such as a word with the header's last space, is learned.
        learned = [
            number
            for number, (start, stop) in enumerate(found["offset_mapping"])
            if number and any(start < answer.stop and answer.start < stop for answer in answers)
        ]
        return self.cut(example, found["input_ids"], learned)

    def _rendered(self, turns: Sequence[dict[str, str]], example: Example, *, opened: bool) -> str:
        if not turns:
            return ""
        try:
            text: str = self._tokenizer.apply_chat_template(list(turns), add_generation_prompt=opened, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise DataError(
                "the chat template refuses this conversation",
                where=example.where,
                why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                remedy="order the messages as the model expects them (mostly: system, user, assistant, user, ...)",
            ) from error
        return text
