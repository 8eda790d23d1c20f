"""What one forward tells: which parameters are read away from their module, and how large activations are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zo_ds.forward.modules import own_parameters

Guests = dict[nn.Module | None, dict[nn.Parameter, None]]


def find_guests(module: nn.Module, parameters: Collection[nn.Parameter], forward: Callable[[], Any]) -> Guests:
    """Parameters that are used while their own module does not run (a parent reads its child's weight).

    Such a parameter is perturbed for as long as the innermost module that runs at that time, or throughout if none
    does (a loss function reads a weight). Weights may be shared by several modules: any of them counts as its own.

    Args:
        module: the model.
        parameters: those to look for.
        forward: runs the model once.

    Returns:
        The parameters by the module that reads them; None stands for the loss function.
    """
    guests: Guests = {}
    running: list[nn.Module] = []

    def note(parameter: nn.Parameter) -> None:
        if parameter not in parameters:
            return
        if not any(parameter is own for other in running for own in own_parameters(other)):
            guests.setdefault(running[-1] if running else None, {})[parameter] = None

    # Outside DeepSpeed's hooks, which handle a module's parameters before and after it runs.
    hooks = [
        hook
        for child in module.modules()
        for hook in (
            child.register_forward_pre_hook(lambda child, _: running.append(child), prepend=True),
            child.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True),
        )
    ]
    try:
        with _Uses(note):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return guests


# Reading these does not use a parameter's values.
_METADATA = {
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_complex",
    "element_size",
    "is_contiguous",
    "type",
}
_VALUE_PROPERTIES = {
    getattr(torch.Tensor, name).__get__
    for name in ("data", "T", "mT", "H", "mH", "real", "imag")
    if hasattr(torch.Tensor, name)
}


class _Uses(TorchFunctionMode):
    def __init__(self, note: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, caller = getattr(func, "__name__", ""), sys._getframe(1).f_globals.get("__name__", "")
        # DeepSpeed gathers a parameter whenever it is looked up, even for its dtype.
        if (
            not caller.startswith("deepspeed.")
            and name not in _METADATA
            and (name != "__get__" or func in _VALUE_PROPERTIES)
        ):
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, nn.Parameter):
                    self._note(leaf)
        return func(*args, **(kwargs or {}))


_FETCHING = ("deepspeed.", "zo_ds.stores.", "torch.distributed.")


@contextmanager
def largest_result() -> Iterator[list[int]]:
    """Within this context, the bytes of the largest tensor that any function returned, as a list of one number."""
    found = [0]

    def note(result: Any) -> None:
        for leaf in tree_leaves(result):
            # What shares its memory with a parameter is not an activation.
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
                found[0] = max(found[0], leaf.numel() * leaf.element_size())

    with _Results(note):
        yield found


class _Results(TorchFunctionMode):
    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Nor is what is made of a parameter on its way to the module.
        fetched = sys._getframe(1).f_globals.get("__name__", "").startswith(_FETCHING)
        if not fetched and getattr(func, "__name__", "") not in ("__get__", "__set__", "t", "transpose"):
            self._note(result)
        return result
