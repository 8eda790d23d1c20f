"""Hidden states that a language model's head would see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.forward.backbone import find_head, takes_use_cache


def hidden_at(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """Hidden states before the head at some positions of a batch, [positions, width], in the model's dtype.

    Args:
        model: a causal or masked LM of transformers, with or without adapters.
        inputs: its keyword arguments, with ``input_ids`` [n, tokens].
        rows: [positions], sequences.
        columns: [positions], tokens within them.

    Raises:
        ConfigError: the model's head cannot be told apart.
    """
    head = find_head(model)
    if head is None:
        raise ConfigError(
            f"the head of a {type(model).__name__} cannot be told from the rest",
            where="method: linear_probe",
            remedy="use another baseline for this model",
        )
    width, seen = inputs["input_ids"].shape[1], list[Tensor]()

    def look(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = args[0]
        # Soft prompts come before the tokens.
        seen.append(hidden[rows, columns + (hidden.shape[1] - width)])
        return (hidden[:1, :1], *args[1:])

    hook = head.register_forward_pre_hook(look)
    try:
        model(**inputs, **({"use_cache": False} if takes_use_cache(model) else {}))
    finally:
        hook.remove()
    return seen[0]
