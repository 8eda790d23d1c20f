"""Soft prompts of peft in a joined forward: those of every replica, in front of that replica's sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.forward.modules import Forward
from zo_ds.forward.perturber import Perturber

_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


def has_soft_prompts(model: Any) -> bool:
    """Whether peft puts trained virtual tokens, or keys and values, before a model's inputs."""
    return hasattr(model, "peft_config") and isinstance(getattr(model, "prompt_encoder", None), nn.ModuleDict)


def virtual_tokens(model: Any) -> int:
    """How many vectors stand before those of a sequence's own tokens, in every layer's input."""
    if not has_soft_prompts(model):
        return 0
    settings = model.peft_config[model.active_adapter]
    return 0 if settings.peft_type in _PREFIXES else int(settings.num_virtual_tokens)


def stand_in_prompts(model: Any, perturber: Perturber) -> set[nn.Module]:
    """Have a model's prompts made for each of the joined places.

    peft looks a prefix up once for every sequence, which the registry of leaves does for all replicas at once. Of any
    other prompt it makes one and repeats it: that happens for one replica after the other here.

    Args:
        model: with or without soft prompts.
        perturber: displaces the prompts' parameters.

    Returns:
        The modules whose inputs need no batch axis now.
    """
    if not virtual_tokens(model):
        return set()
    original: Forward = model.get_prompt

    def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
        joined = perturber.joined
        examples = batch_size if joined is None else batch_size // joined.count
        return torch.cat(perturber.for_each(lambda: original(examples, *args, **kwargs)))

    model.get_prompt = get_prompt
    return set(model.prompt_encoder.modules())
