"""Names of parameters: those under which weights are saved and digested, and which their noise is drawn for."""

from __future__ import annotations

from typing import Any

from torch import nn


def canonical_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every parameter of a model under one name; tied ones under their first.

    That is its name in the model, except for what an adapter adds: peft has a label in those names (``default``) that
    it leaves out when it saves them, and so does this.

    Args:
        model: any module, or one that peft has wrapped.
    """
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(parameter, name)
    label = getattr(model, "active_adapter", None) if is_adapted(model) else None
    if isinstance(label, str):
        names = {parameter: _without(label, name) for parameter, name in names.items()}
        encoder = f"prompt_encoder.{label}."
        if [name for name in names.values() if name.startswith(encoder)] == [f"{encoder}embedding.weight"]:
            names = {p: "prompt_embeddings" if name.startswith(encoder) else name for p, name in names.items()}
    return names


def is_adapted(model: Any) -> bool:
    """Whether a model is one that peft has wrapped."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _without(label: str, name: str) -> str:
    """Peft's name in a file: ``...lora_A.default.weight`` is ``...lora_A.weight`` there."""
    if ".modules_to_save." in name:
        return name.replace(f".modules_to_save.{label}.", ".")
    if name.endswith(f".{label}"):
        return name.removesuffix(f".{label}")
    stem, _, last = name.rpartition(".")
    if not stem.endswith(f".{label}") or stem.startswith("prompt_encoder."):
        return name
    stem = stem.removesuffix(f".{label}")
    return stem if stem.endswith("lora_magnitude_vector") else f"{stem}.{last}"
