"""A causal LM chooses: the log-likelihood of each option as the continuation of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.tasks.batch import EMPTY, Batch, ask, in_order, lay_out, log_likelihoods, logits
from zo_ds.tasks.layout import Prompt
from zo_ds.tasks.objectives import ScoreLoss, cross_entropy
from zo_ds.tasks.packing import Packing
from zo_ds.tasks.prompts import Tokenizer
from zo_ds.tasks.scorer import Scorer, check_different, continuation, first_token
from zo_ds.tasks.task import Task

Tokens = tuple[int, ...]


class OptionLikelihood(Scorer):
    """Causal LM: mean (or summed) log-likelihood of each option's tokens.

    Where all examples of a batch have the same options of one token, those are read off one position. Else the options
    of a prompt share its computation where sequences can be packed, or every (prompt, option) pair is a sequence.

    Args:
        task, tokenizer, max_tokens, objective: see `Scorer`.
        normalised: the mean over an option's tokens instead of the sum.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        max_tokens: int,
        objective: ScoreLoss = cross_entropy,
        *,
        normalised: bool = True,
    ) -> None:
        super().__init__(task, tokenizer, max_tokens, objective)
        self._normalised = normalised
        self._known: dict[tuple[str, tuple[str, ...]], tuple[Tokens, ...]] = {}

    def options(self, example: Example) -> tuple[Tokens, ...]:
        """Tokens of each option.

        Raises:
            ConfigError: two label words are the same tokens.
        """
        key = (example.after, example.options)
        if key not in self._known:
            found = tuple(tuple(continuation(self._tokenizer, example.after, option)) for option in example.options)
            if self._task.label_words:
                check_different(found, self._task.label_words)
            self._known[key] = found
        return self._known[key]

    def length(self, example: Example) -> int:
        """See `Scorer.length`."""
        return len(self._stem(example, self.options(example)))

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        options = [self.options(example) for example in examples]
        stems = [self._stem(example, own) for example, own in zip(examples, options, strict=True)]
        labels = torch.tensor([example.label for example in examples])
        if len(set(options)) == 1 and all(len(option) == 1 for option in options[0]):
            answers = [(number, len(stem) - 1, number) for number, stem in enumerate(stems)]
            asked = ask(
                lay_out([Prompt(stem) for stem in stems], self._pad_id, self.packing, lockstep=self.lockstep), answers
            )
            batch = Batch(asked, labels, torch.tensor([option[0] for option in options[0]]), EMPTY)
        else:
            batch = self._sequences(stems, options, labels)
        return batch._replace(accepted=_accepted(examples))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`. Only the positions that predict an answer reach the head."""
        if not batch.lengths.numel():
            return in_order(batch, [logits(model, asked)[:, batch.targets] for asked in batch.asked])
        total = log_likelihoods(model, batch).view(*batch.lengths.shape, -1).sum(-1)
        if self._normalised:
            total = total / batch.lengths.clamp(min=1)
        return total.masked_fill(batch.lengths == 0, -torch.inf)

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """See `Scorer.packings`."""
        return [Packing.of(module, causal=True)]

    def _stem(self, example: Example, options: Sequence[Tokens]) -> Tokens:
        # The last token of an option is never an input.
        stem = self.prompts.encode(example, max(map(len, options)) - 1)
        return tuple(stem) or (first_token(self._tokenizer),)

    def _sequences(self, stems: Sequence[Tokens], options: Sequence[tuple[Tokens, ...]], labels: Tensor) -> Batch:
        # Tokens after the first are predicted from those before them.
        prompts = [Prompt(stem, tuple(option[:-1] for option in own)) for stem, own in zip(stems, options, strict=True)]
        shared = self.packing is not None and self.packing.takes(prompts)
        if not shared:
            prompts = [Prompt(prompt.stem + branch) for prompt in prompts for branch in prompt.branches]
        most, longest = max(map(len, options)), max(len(option) for own in options for option in own)
        answers = []
        targets = torch.zeros(len(stems) * most * longest, dtype=torch.int64)
        lengths = torch.zeros(len(stems), most, dtype=torch.int64)
        sequence = 0
        for number, (stem, own) in enumerate(zip(stems, options, strict=True)):
            for word, option in enumerate(own):
                lengths[number, word] = len(option)
                for token, target in enumerate(option):
                    slot = (number * most + word) * longest + token
                    targets[slot] = target
                    if shared:
                        answers.append((number, prompts[number].place(word, token - 1), slot))
                    else:
                        answers.append((sequence, len(stem) - 1 + token, slot))
                sequence += 1
        return Batch(
            ask(lay_out(prompts, self._pad_id, self.packing, lockstep=self.lockstep), answers), labels, targets, lengths
        )


def _accepted(examples: Sequence[Example]) -> Tensor:
    most = max(len(example.options) for example in examples)
    rows = [
        [option in example.answers for option in example.options] + [False] * (most - len(example.options))
        for example in examples
    ]
    return torch.tensor(rows)
