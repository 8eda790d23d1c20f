"""The part of a model that flows for all replicas at once: all but its head, where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zo_ds.forward.modules import Forward, stand_in

Answer = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


def find_backbone(model: nn.Module) -> nn.Module:
    """The module whose calls are joined.

    A transformers model names its part below the head (``base_model_prefix``); the head, whose output is by far the
    largest activation, and the loss then run one replica at a time. Any other module is joined as a whole.
    """
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


def outside_of(part: nn.Module, model: nn.Module) -> list[nn.Module]:
    """Modules of a model that are not within a part of it."""
    inside = set(part.modules())
    return [module for module in model.modules() if module not in inside]


class Backbone:
    """Lets somebody else answer the calls of a module, within a context.

    Args:
        module: see `find_backbone`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._answer: Answer | None = None
        stand_in(module, self._forward)

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
