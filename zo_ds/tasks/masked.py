"""A masked LM fills in: the logit of each label word at the mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError
from zo_ds.tasks.batch import EMPTY, Batch, ask, in_order, lay_out, logits
from zo_ds.tasks.layout import Prompt
from zo_ds.tasks.objectives import ScoreLoss, cross_entropy
from zo_ds.tasks.packing import Packing
from zo_ds.tasks.prompts import MASK, Tokenizer
from zo_ds.tasks.scorer import Scorer, check_different
from zo_ds.tasks.task import Task


class LabelWords(Scorer):
    """Masked LM: the logit of each label word at the mask, see `Scorer`.

    Raises:
        ConfigError: the task has no mask, the tokenizer none, or a word is not one token.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, objective: ScoreLoss = cross_entropy) -> None:
        masks = task.template.count(MASK)
        if masks != 1 or tokenizer.mask_token is None:
            raise ConfigError(
                "a masked LM is asked through one mask, and this one cannot be",
                where=f"task.name = {task.name}, template {task.template!r}",
                why=f"the template has {masks} '{MASK}'" if tokenizer.mask_token else "the tokenizer has no mask token",
                remedy='for example template: "{text} It was {mask}."; published tasks for masked LMs end in -masked',
            )
        self._words = [_word_token(tokenizer, word) for word in task.label_words]
        check_different([[word] for word in self._words], task.label_words)
        super().__init__(task, tokenizer, max_tokens, objective)

    def encode(self, examples: Sequence[Example]) -> Batch:
        """See `Scorer.encode`."""
        prompts = [Prompt(tuple(self.prompts.encode(example))) for example in examples]
        mask = self._tokenizer.mask_token_id
        answers = [(number, prompt.stem.index(mask), number) for number, prompt in enumerate(prompts)]
        labels = torch.tensor([example.label for example in examples])
        asked = ask(lay_out(prompts, self._pad_id, self.packing, lockstep=self.lockstep), answers)
        return Batch(asked, labels, torch.tensor(self._words), EMPTY)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Scorer.scores`. Only the masks reach the head."""
        return in_order(batch, [logits(model, asked)[:, batch.targets] for asked in batch.asked])

    def packings(self, module: nn.Module) -> Sequence[Packing]:
        """See `Scorer.packings`."""
        # RoBERTa counts positions from behind its padding token.
        first = (0, (self._tokenizer.pad_token_id or 0) + 1)
        return [Packing.of(module, causal=False, first_position=position) for position in first]


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
