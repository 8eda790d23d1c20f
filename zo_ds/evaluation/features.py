"""What a model makes of a prompt: the hidden state that its answer is predicted from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_ds.data.examples import Example
from zo_ds.evaluation.shared import over_ranks
from zo_ds.forward.hidden import hidden_at
from zo_ds.parallel.channel import Channel
from zo_ds.tasks.batch import Asked, ask
from zo_ds.tasks.layout import padded
from zo_ds.tasks.scorer import Scorer


def features(
    call: Callable[[Callable[[nn.Module, Any], Tensor], Any], Tensor],
    scorer: Scorer,
    examples: Sequence[Example],
    batch_size: int,
    channel: Channel,
    device: torch.device,
    *,
    mask_token: int | None = None,
    lockstep: bool = False,
) -> Tensor:
    """Hidden states before the head, at the last token of each prompt or at its mask; fp32 [examples, width].

    Args:
        call: runs a function of (model, batch) without gradients, e.g. `ZOEngine.call`.
        scorer: encodes prompts.
        examples: one or more.
        batch_size: examples in one forward pass.
        channel: to the other ranks.
        device: where the model runs.
        mask_token: of a masked LM.
        lockstep: every rank must run as many forwards as any other.
    """

    def states(batch: list[Example]) -> Tensor:
        asked = tree_map(lambda leaf: leaf.to(device), _prompts(scorer, batch, mask_token))
        return call(_hidden, asked).cpu()

    return over_ranks(states, examples, scorer.length, batch_size, channel, lockstep=lockstep)


def _prompts(scorer: Scorer, examples: Sequence[Example], mask_token: int | None) -> list[Asked]:
    rows = [scorer.prompts.encode(example) for example in examples]
    columns = [len(row) - 1 if mask_token is None else row.index(mask_token) for row in rows]
    return ask(
        padded(rows, 0, grouped=not scorer.lockstep),
        [(number, column, number) for number, column in enumerate(columns)],
    )


def _hidden(model: nn.Module, parts: list[Asked]) -> Tensor:
    states = [hidden_at(model, asked.inputs, asked.rows, asked.columns).float() for asked in parts]
    return torch.cat(states)[torch.cat([asked.slots for asked in parts]).argsort()]
