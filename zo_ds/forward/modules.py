"""Looking at modules without disturbing them, and standing in for their forward."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module holds itself, in order; not those of its children."""
    # DeepSpeed's dictionary gathers on look-up; the plain look-up only looks.
    held = module._parameters
    look_up = OrderedDict.__getitem__ if isinstance(held, OrderedDict) else dict.__getitem__
    return [p for p in (look_up(held, key) for key in held) if p is not None]


def stand_in(module: nn.Module, forward: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Run ``forward(original, args, kwargs)`` whenever the module is called, within all of its hooks.

    The signature that callers can inspect stays the original's.
    """
    original: Forward = module.forward

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(original, args, kwargs)

    module.forward = run


def is_unshared(tensor: Tensor) -> bool:
    """Whether nothing but the caller's tensor refers to its memory: one reference is that, one this function's."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2
