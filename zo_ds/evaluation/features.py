"""What a model makes of a prompt: the hidden state that its answer is predicted from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_ds.data.examples import Example
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
        channel: to the other ranks; batch number b is computed by rank b mod ranks.
        device: where the model runs.
        mask_token: of a masked LM.
        lockstep: see `zo_ds.evaluation.evaluate.evaluate`.
    """
    order = sorted(range(len(examples)), key=lambda index: (scorer.length(examples[index]), index))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // channel.world_size) * channel.world_size
    found: Tensor | None = None
    for number in range(channel.rank, rounds if lockstep else len(batches), channel.world_size):
        rows = batches[min(number, len(batches) - 1)]
        parts = [_moved(asked, device) for asked in _prompts(scorer, [examples[index] for index in rows], mask_token)]
        states = call(_hidden, parts).cpu()
        if found is None:
            found = torch.zeros(len(examples), states.shape[1])
        if number < len(batches):
            found[rows] = states
    width = max(int(w) for w in channel.all_gather(torch.tensor([0 if found is None else found.shape[1]])))
    found = torch.zeros(len(examples), width) if found is None else found
    # Every row is written by one rank and zero on the others.
    return torch.stack(channel.all_gather(found)).sum(0)


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


def _moved(asked: Asked, device: torch.device) -> Asked:
    moved: Asked = tree_map(lambda leaf: leaf.to(device), asked)
    return moved
