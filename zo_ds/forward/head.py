"""Logits at the positions that matter, and only there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zo_ds.forward.backbone import find_head, without_adapters


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
    width = inputs["input_ids"].shape[1]
    # The key-value cache would hold every replica's keys and values for nothing.
    known = inspect.signature(without_adapters(model).forward).parameters
    extra = {"use_cache": False} if "use_cache" in known and "use_cache" not in inputs else {}
    head = find_head(model)
    if head is None:
        logits: Tensor = model(**inputs, **extra).logits
        return logits[rows, columns + (logits.shape[1] - width)]

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = args[0]
        # Soft prompts come before the tokens.
        return (hidden[rows, columns + (hidden.shape[1] - width)].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(keep)
    try:
        logits = model(**inputs, **extra).logits
    finally:
        hook.remove()
    return logits[0]
