"""Encoded examples: calls of the model, and where in them the answers stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_ds.forward.head import logits_at
from zo_ds.tasks.layout import Layout, Part, Prompt, packed, padded
from zo_ds.tasks.packing import Packing


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
        targets: token ids whose likelihood is asked for: [slots], or [options] where all examples have the same
            options of one token; empty where that is not the question.
        lengths: int64 [examples, options], tokens of each option, 0 for one that an example does not have; empty where
            all examples have the same options of one token.
        accepted: bool [examples, options], options that count as right beside the label's; empty where there are none.
    """

    asked: list[Asked]
    labels: Tensor
    targets: Tensor
    lengths: Tensor
    accepted: Tensor = torch.empty(0, dtype=torch.bool)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved: Batch = tree_map(lambda leaf: leaf.to(device), self)
        return moved


class Pair(NamedTuple):
    """Two batches of the same examples, for a scorer that asks in two ways.

    Attributes:
        first, second: batches, or anything else that moves to a device.
    """

    first: Any
    second: Any

    def to(self, device: torch.device) -> Pair:
        """The same on a device."""
        return Pair(self.first.to(device), self.second.to(device))


EMPTY = torch.empty(0, dtype=torch.int64)


def lay_out(prompts: Sequence[Prompt], pad_id: int, packing: Packing | None, *, lockstep: bool = False) -> Layout:
    """Rows of sequences, packed if there is a packing that takes them, else padded.

    Args:
        prompts: the sequences.
        pad_id: any token; it is masked.
        packing: how they may share rows, if they may.
        lockstep: in one call of the model, whatever their lengths.
    """
    if packing is not None and packing.takes(prompts):
        layout = packed(
            prompts,
            pad_id,
            causal=packing.causal,
            hidden_size=packing.hidden_size,
            first_position=packing.first_position,
            rows=packing.rows,
        )
        if len(layout.parts) == 1 or not lockstep:
            return layout
    return padded([prompt.stem for prompt in prompts], pad_id, grouped=not lockstep)


def ask(layout: Layout, answers: Sequence[tuple[int, int, int]]) -> list[Asked]:
    """Calls of the model.

    Args:
        layout: where every sequence is.
        answers: (sequence, its token, slot).
    """
    found: list[list[tuple[int, int, int]]] = [[] for _ in layout.parts]
    for sequence, token, slot in answers:
        part, row, column = layout.places[sequence]
        found[part].append((row, column + token, slot))
    return [Asked(inputs, *torch.tensor(places).unbind(1)) for inputs, places in zip(layout.parts, found, strict=True)]


def logits(model: nn.Module, asked: Asked) -> Tensor:
    """fp32 [answers, vocabulary]."""
    return logits_at(model, asked.inputs, asked.rows, asked.columns).float()


def log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """fp32 [slots]: log-probability of each slot's target; 0 in slots that no call answers."""
    total = torch.zeros(batch.targets.shape, dtype=torch.float32, device=batch.targets.device)
    for asked in batch.asked:
        each = torch.log_softmax(logits(model, asked), dim=-1)
        total = total.index_put((asked.slots,), each.gather(-1, batch.targets[asked.slots].unsqueeze(-1)).squeeze(-1))
    return total


def in_order(batch: Batch, scores: Sequence[Tensor]) -> Tensor:
    """Scores of every call's answers, in the order of their slots."""
    slots = torch.cat([asked.slots for asked in batch.asked])
    return torch.cat(list(scores))[slots.argsort()]
