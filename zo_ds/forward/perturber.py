"""Shows every module perturbed copies of its parameters while it runs; the weights themselves are never written.

A parameter's ``.data`` is rebound to a scratch copy when its module is entered and rebound to the weights when it is
left, so at most one module's parameters exist twice. Works on gathered ZeRO-3 parameters as on resident ones, if the
hooks are registered after DeepSpeed's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.ops import api as ops


@dataclass(frozen=True)
class Displacement:
    """Where the loss is evaluated: at theta + eps * u.

    Attributes:
        seed: step seed.
        direction: which u.
        eps: radius, signed.
    """

    seed: int
    direction: int
    eps: float


class Perturber:
    """Hooks on every module; those that use trainable parameters see them displaced.

    Args:
        module: the model, after DeepSpeed has taken it over.
        parameters: what is perturbed.
        structure: how directions are built.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[nn.Parameter, ParamInfo], structure: NoiseStructure
    ) -> None:
        self._infos = dict(parameters)
        self._structure = structure
        self._displacement: Displacement | None = None
        self._originals: dict[nn.Parameter, Tensor] = {}
        self._depth: dict[nn.Parameter, int] = {}
        self._scratch: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._guests: dict[nn.Module | None, dict[nn.Parameter, None]] = {}
        self._module = module
        for child in module.modules():
            child.register_forward_pre_hook(self._enter)
            child.register_forward_hook(self._leave, prepend=True, always_call=True)

    @contextmanager
    def displaced(self, displacement: Displacement | None) -> Iterator[None]:
        """Within this context the model runs at the displaced weights; None means at theta itself."""
        self._displacement = displacement
        try:
            if displacement is not None:
                for parameter in self._guests.get(None, {}):
                    self._depth[parameter] = 1
                    self._show(parameter, displacement)
            yield
        finally:
            self._displacement = None
            for parameter, original in self._originals.items():
                parameter.data = original
            self._originals.clear()
            self._depth.clear()

    def survey(self, forward: Callable[[], Any]) -> None:
        """Find parameters that are used while their own module does not run (a parent reads its child's weight).

        Such a parameter is perturbed for as long as the innermost module that runs at that time, or throughout if
        none does (a loss function reads a weight). Weights may be shared by several modules: any of them counts as
        its own.

        Args:
            forward: runs the model once at theta.
        """
        running: list[nn.Module] = []

        def note(parameter: nn.Parameter) -> None:
            if parameter not in self._infos:
                return
            if not any(parameter is own for module in running for own in _own_parameters(module)):
                self._guests.setdefault(running[-1] if running else None, {})[parameter] = None

        # Outside DeepSpeed's hooks, which handle a module's parameters before and after it runs.
        hooks = [
            hook
            for module in self._module.modules()
            for hook in (
                module.register_forward_pre_hook(lambda module, _: running.append(module), prepend=True),
                module.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True),
            )
        ]
        try:
            with _Survey(note):
                forward()
        finally:
            for hook in hooks:
                hook.remove()

    def _subject(self, module: nn.Module, args: tuple[Any, ...]) -> list[nn.Parameter]:
        # A dictionary, since a module may hold one parameter under two names.
        own = [] if _only_gathers_rows(module, args) else [p for p in _own_parameters(module) if p in self._infos]
        return list(dict.fromkeys(own) | self._guests.get(module, {}))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._displacement is None:
            return
        for parameter in self._subject(module, args):
            self._depth[parameter] = self._depth.get(parameter, 0) + 1
            if self._depth[parameter] == 1:
                self._show(parameter, self._displacement)

    def _show(self, parameter: nn.Parameter, displacement: Displacement) -> None:
        theta = parameter.data
        shelf = self._scratch.setdefault((theta.shape, theta.dtype), [])
        out = shelf.pop() if shelf else torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        info = self._infos[parameter]
        if theta.shape != info.shape:
            raise ConfigError(
                f"'{info.name}' is not gathered where it is used",
                where="loss_fn or a module's forward",
                why="ZeRO-3 gathers a parameter for the forward of its module, and only then",
                remedy="call the module instead of reading its weight, or use ZeRO stage 0",
            )
        site, step = info.site(self._structure), displacement
        ops.perturb(theta.contiguous(), site, step.seed, [step.direction], [step.eps], out=out.unsqueeze(0))
        self._originals[parameter] = theta
        parameter.data = out

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._displacement is None:
            return None
        if output is not None and _only_gathers_rows(module, args):
            output = self._rows(module, args[0], output)
        for parameter in self._subject(module, args):
            depth = self._depth.get(parameter, 0)
            if depth == 1:
                shown = parameter.data
                parameter.data = self._originals.pop(parameter)
                # A module may return or keep a view of its weight (learned positions do).
                if _is_unshared(shown):
                    self._scratch[(shown.shape, shown.dtype)].append(shown)
            self._depth[parameter] = max(0, depth - 1)
        return output

    def _rows(self, module: nn.Module, ids: Tensor, output: Tensor) -> Tensor:
        """What an embedding gives at the displaced weights, without displacing the whole table."""
        (table,), at = _own_parameters(module), self._displacement
        if at is None or table not in self._infos or table in self._originals:
            return output
        site = self._infos[table].site(self._structure)
        return ops.embedding_rows(table.data.contiguous(), ids.long(), site, at.seed, [at.direction], [at.eps])[0]


def _is_unshared(tensor: Tensor) -> bool:
    """Whether nothing else refers to a tensor's memory: one reference is the tensor's, one this function's."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2


def _only_gathers_rows(module: nn.Module, args: tuple[Any, ...]) -> bool:
    # Subclasses may do more, and max_norm writes to the table.
    return type(module) is nn.Embedding and len(args) == 1 and module.max_norm is None


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    # DeepSpeed's dictionary gathers on look-up; the plain look-up only looks.
    held = module._parameters
    look_up = OrderedDict.__getitem__ if isinstance(held, OrderedDict) else dict.__getitem__
    return [p for p in (look_up(held, key) for key in held) if p is not None]


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


class _Survey(TorchFunctionMode):
    def __init__(self, note: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _METADATA and (name != "__get__" or func in _VALUE_PROPERTIES):
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, nn.Parameter):
                    self._note(leaf)
        return func(*args, **(kwargs or {}))
