"""Logits at the positions that matter, and only there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.forward.backbone import find_head, takes_use_cache
from zo_ds.forward.soft_prompts import has_soft_prompts


def logits_at(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """Logits at some positions of a batch; the other positions do not reach the head where it can be told apart.

    Args:
        model: a causal or masked LM of transformers, with or without adapters.
        inputs: its keyword arguments, with ``input_ids`` [n, tokens].
        rows: [positions], sequences.
        columns: [positions], tokens within them.

    Returns:
        [positions, vocabulary], in the model's dtype.
    """
    examples, width = inputs["input_ids"].shape
    # The key-value cache would hold every replica's keys and values for nothing.
    extra = {"use_cache": False} if "use_cache" not in inputs and takes_use_cache(model) else {}
    head = find_head(model)
    if head is None:
        logits: Tensor = model(**inputs, **extra).logits
        return logits[rows, columns + (logits.shape[1] - width)]
    if has_soft_prompts(model):
        keep, slots = _by_sequence(rows, columns, examples, width)
        index: tuple[Any, ...] = (rows, slots)
    else:
        keep, index = lambda hidden: hidden[rows, columns + (hidden.shape[1] - width)].unsqueeze(0), (0,)
    hook = head.register_forward_pre_hook(lambda _, args: (keep(args[0]), *args[1:]))
    try:
        logits = model(**inputs, **extra).logits
    finally:
        hook.remove()
    return logits[index]


def _by_sequence(rows: Tensor, columns: Tensor, examples: int, width: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """For a head that runs for all replicas at once, and must find the sequences on the first axis.

    Returns:
        What turns [R * n, tokens, width] into [R * n, most positions of a sequence, width], and where in that each
        position is.
    """
    order = rows.argsort(stable=True)
    counts = rows.bincount(minlength=examples)
    slots = torch.empty_like(rows)
    slots[order] = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
    table = columns.new_zeros(examples, int(counts.max()))
    table[rows, slots] = columns

    def keep(hidden: Tensor) -> Tensor:
        # Soft prompts come before the tokens.
        places = table.repeat(hidden.shape[0] // examples, 1) + (hidden.shape[1] - width)
        return hidden[torch.arange(len(places), device=places.device).unsqueeze(1), places]

    return keep, slots
