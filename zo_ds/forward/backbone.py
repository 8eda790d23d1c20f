"""The part of a model that flows for all replicas at once: all but its head, where it has one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zo_ds.forward.modules import Forward, stand_in
from zo_ds.forward.soft_prompts import has_soft_prompts, virtual_tokens

Answer = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


def find_backbone(model: nn.Module) -> nn.Module:
    """The module whose calls are joined.

    A transformers model names its part below the head (``base_model_prefix``); the head, whose output is by far the
    largest activation, and the loss then run one replica at a time. Any other module is joined as a whole, and so is a
    model behind soft prompts: what its part below the head is given differs from replica to replica.
    """
    if has_soft_prompts(model):
        return model
    inner: Any = without_adapters(model)
    below = getattr(inner, getattr(inner, "base_model_prefix", "") or "base_model", None)
    return below if isinstance(below, nn.Module) else model


def find_head(model: nn.Module) -> nn.Module | None:
    """The module that turns a causal or masked LM's hidden states into logits; None if there is none to be found."""
    inner: Any = without_adapters(model)
    look_up = getattr(inner, "get_output_embeddings", None)
    last = look_up() if look_up is not None else None
    if last is None:
        return None
    below = getattr(inner, inner.base_model_prefix, None)
    return next((child for child in inner.children() if child is not below and last in child.modules()), None)


def without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model that a PEFT model wraps, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    inner: nn.Module = model if unwrap is None else unwrap()
    return inner


def takes_use_cache(model: nn.Module) -> bool:
    """Whether a model, which adapters may wrap, can be told not to keep keys and values."""
    return "use_cache" in inspect.signature(without_adapters(model).forward).parameters


def outside_of(part: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Modules of a model that are not within a part of it."""
    inside = set(part.modules())
    return [module for module in model.modules() if module not in inside]


class Backbone:
    """Lets somebody else answer the calls of a module, within a context.

    Args:
        module: see `find_backbone`.

    Attributes:
        brings_cache: whether calls may use, and give back, a key-value cache that nobody asked for.
        takes_use_cache: whether they can be told not to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.brings_cache = has_soft_prompts(module)
        self.takes_use_cache = takes_use_cache(module)
        self._virtual = virtual_tokens(module)
        self._answer: Answer | None = None
        stand_in(module, self._forward)

    def tokens(self, lead: Tensor) -> int:
        """Vectors of each example in the layers below.

        Args:
            lead: the first input.
        """
        return self._virtual + (lead.shape[1] if lead.dim() > 1 else 1)

    @contextmanager
    def answered_by(self, answer: Answer | None) -> Iterator[None]:
        """Calls go to ``answer(the module's own forward, args, kwargs)``; None: to the module itself."""
        outside, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = outside

    def _forward(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(*args, **kwargs) if self._answer is None else self._answer(original, args, kwargs)
