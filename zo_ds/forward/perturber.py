"""Shows every module displaced parameters while it runs; the weights themselves are never written.

One replica: a parameter's ``.data`` is rebound to a scratch copy when its module is entered and rebound to the weights
when it is left, so at most one module's parameters exist twice. Many replicas at once: the modules that the registry
of `leaves` knows compute all of them, any other runs once for each. Everything takes place within the module's own
forward, and so after DeepSpeed's hooks have gathered a ZeRO-3 parameter and before they release it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.forward.axes import Axes
from zo_ds.forward.displacement import Anywhere, Displacement, Shift
from zo_ds.forward.leaves import Leaf, NotALeafError, elementwise, leaf_of
from zo_ds.forward.modules import Forward, is_unshared, own_parameters, stand_in
from zo_ds.forward.replicas import LostAxisError, Replicas, Scratch, Together
from zo_ds.forward.split import join, split
from zo_ds.forward.survey import Guests, find_guests
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.ops import api as ops


class Perturber:
    """Stands in for the forward of every module that holds parameters, or reads those of another.

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
        self._module = module
        self._place: Anywhere = None
        self._replicas: Replicas | None = None
        self._joined: Together | None = None
        self._axes: dict[nn.Module, Axes] = {}
        self._originals: dict[nn.Parameter, Tensor] = {}
        self._depth: dict[nn.Parameter, int] = {}
        self._shelves: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._scratch = Scratch()
        self._guests: Guests = {}
        self._leaves: dict[nn.Module, Leaf | None] = {}
        self._trusted: set[type[nn.Module]] = set()
        for child in module.modules():
            if own_parameters(child):
                self._stand_in(child)

    @property
    def holders(self) -> dict[nn.Module, bool]:
        """Modules that hold parameters, and whether the registry computes them for many replicas at once."""
        return {module: leaf is not None for module, leaf in self._leaves.items()}

    def uses_parameters(self, module: nn.Module) -> bool:
        """Whether a module's own code reads trained parameters, in a way the registry does not know."""
        return bool(self._subject(module)) and self._leaves[module] is None

    @property
    def joined(self) -> Together | None:
        """The places that flow through the model at present, None if one runs alone."""
        return self._joined

    @property
    def within_one(self) -> bool:
        """Whether a module runs for one of the joined places on its own."""
        return self._joined is not None and self._replicas is not None and self._replicas.together is not self._joined

    @contextmanager
    def displaced(self, place: Anywhere, *, leaves: bool = False) -> Iterator[None]:
        """Within this context the model runs at one place.

        Args:
            place: where.
            leaves: let the registry compute what it knows, as in a batched forward; else every module's own code runs
                on displaced copies. It knows nothing of a `Shift`.
        """
        self._place = place
        self._replicas = self._replicas_of(Together((place,))) if leaves and not isinstance(place, Shift) else None
        try:
            if place is not None:
                for parameter in self._guests.get(None, {}):
                    self._depth[parameter] = 1
                    self._show(parameter, place)
            yield
        finally:
            self._place = self._replicas = None
            for parameter, original in self._originals.items():
                parameter.data = original
            self._originals.clear()
            self._depth.clear()

    @contextmanager
    def together(self, places: Together) -> Iterator[None]:
        """Within this context modules take activations of many places, replica-major."""
        outside = (self._place, self._replicas, self._originals, self._depth)
        shown = {parameter: parameter.data for parameter in self._originals}
        for parameter, original in self._originals.items():
            parameter.data = original
        self._originals, self._depth, self._joined = {}, {}, places
        self._place, self._replicas = None, self._replicas_of(places)
        try:
            yield
        finally:
            self._joined = None
            self._place, self._replicas, self._originals, self._depth = outside
            for parameter, copy in shown.items():
                parameter.data = copy

    def survey(self, forward: Callable[[], Any]) -> None:
        """Find parameters that are used while their own module does not run, see `find_guests`.

        Args:
            forward: runs the model once at theta.
        """
        self._guests = find_guests(self._module, self._infos, forward)
        for host in self._guests:
            if host is not None:
                self.run_each(host)

    def for_each(self, call: Callable[[], Any]) -> list[Any]:
        """What a call that takes no activations gives at each of the joined places; at one place, if that is all."""
        replicas, found = self._replicas, []
        if replicas is None or replicas.count == 1:
            return [call()]
        try:
            for place in replicas.places:
                self._replicas = self._replicas_of(Together((place,)))
                found.append(call())
        finally:
            self._replicas = replicas
        return found

    def forget_copies(self) -> None:
        """Free the scratch copies of whole parameters; they are made again where they are needed."""
        self._shelves.clear()

    def know(self, axes: Mapping[nn.Module, Axes]) -> None:
        """Learn which inputs of modules have the batch axis."""
        self._axes = dict(axes)

    def run_each(self, module: nn.Module) -> None:
        """From now on, run a module once for each replica: something in it loses the batch axis."""
        if module not in self._leaves:
            self._stand_in(module)
        self._leaves[module] = None

    def _replicas_of(self, places: Together) -> Replicas:
        return Replicas(places, self._infos, self._structure, self._scratch, self._originals, self._axes)

    def _stand_in(self, module: nn.Module) -> None:
        self._leaves[module] = leaf_of(module)
        stand_in(module, lambda original, args, kwargs: self._forward(module, original, args, kwargs))

    def _forward(self, module: nn.Module, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._replicas is None:
            return self._alone(module, self._place, original, args, kwargs)
        if self._leaves[module] is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            try:
                return self._at_once(module, self._replicas, original, args[0])
            except NotALeafError:
                self._distrust(type(module))
        return self._each(module, self._replicas, original, args, kwargs)

    def _at_once(self, module: nn.Module, replicas: Replicas, original: Forward, x: Tensor) -> Tensor:
        leaf, kind = self._leaves[module], type(module)
        assert leaf is not None
        result = leaf(module, replicas, original, x)
        if leaf is elementwise and kind not in self._trusted:
            # That it works on vectors alone is a guess from its parameters' shapes.
            check: Tensor = self._each(module, replicas, original, (x,), {})
            scale = float(check.abs().max())
            if check.dtype != result.dtype or not torch.allclose(result, check, rtol=1e-3, atol=1e-5 * scale):
                raise NotALeafError
            self._trusted.add(kind)
        return result

    def _distrust(self, kind: type[nn.Module]) -> None:
        for module in self._leaves:
            if type(module) is kind:
                self._leaves[module] = None

    def _each(
        self, module: nn.Module, replicas: Replicas, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call for each replica, at that replica's weights."""
        if replicas.count == 1:
            return self._alone(module, replicas.places[0], original, args, kwargs)
        if not any(map(replicas.displaces, (*self._subject(module), *module.parameters()))):
            return original(*args, **kwargs)
        batched = replicas.batched(module, (args, kwargs))
        if not any(batched):
            raise LostAxisError(f"no input of a {type(module).__name__} has a batch axis")
        outputs = []
        try:
            parts = split((args, kwargs), replicas.count, batched)
            for place, (own_args, own_kwargs) in zip(replicas.places, parts, strict=True):
                self._replicas = self._replicas_of(Together((place,)))
                outputs.append(self._alone(module, place, original, own_args, own_kwargs))
        finally:
            self._replicas = replicas
        return join(outputs)

    def _alone(
        self, module: nn.Module, place: Anywhere, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's own code on displaced copies of what it uses."""
        if place is None:
            return original(*args, **kwargs)
        if isinstance(place, Displacement) and _only_gathers_rows(module, args, kwargs):
            (table,) = own_parameters(module)
            if table in self._infos and table not in self._originals:
                return self._replicas_of(Together((place,))).rows(table, args[0], table.dtype)[0]
        subject = self._subject(module)
        try:
            for parameter in subject:
                self._depth[parameter] = self._depth.get(parameter, 0) + 1
                if self._depth[parameter] == 1:
                    self._show(parameter, place)
            return original(*args, **kwargs)
        finally:
            for parameter in subject:
                self._hide(parameter)

    def _subject(self, module: nn.Module) -> list[nn.Parameter]:
        # A dictionary, since a module may hold one parameter under two names.
        own = [p for p in own_parameters(module) if p in self._infos]
        return list(dict.fromkeys(own) | self._guests.get(module, {}))

    def _show(self, parameter: nn.Parameter, place: Displacement | Shift) -> None:
        theta = parameter.data
        shelf = self._shelves.setdefault((theta.shape, theta.dtype), [])
        out = shelf.pop() if shelf else torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        info = self._infos[parameter]
        if theta.shape != info.shape:
            raise ConfigError(
                f"'{info.name}' is not gathered where it is used",
                where="loss_fn or a module's forward",
                why="ZeRO-3 gathers a parameter for the forward of its module, and only then",
                remedy="call the module instead of reading its weight, or use ZeRO stage 0",
            )
        site = info.site(self._structure)
        if isinstance(place, Shift):
            # The copy may have been made in a forward, and torch writes to such a tensor in this mode only.
            with torch.inference_mode():
                out.copy_(theta)
                ops.apply_([out], [site], place.plan)
        else:
            ops.perturb(theta.contiguous(), site, place.seed, [place.direction], [place.eps], out=out.unsqueeze(0))
        self._originals[parameter] = theta
        parameter.data = out

    def _hide(self, parameter: nn.Parameter) -> None:
        depth = self._depth.get(parameter, 0)
        if depth == 1 and parameter in self._originals:
            shown = parameter.data
            parameter.data = self._originals.pop(parameter)
            # A module may return or keep a view of its weight (learned positions do).
            if is_unshared(shown):
                self._shelves[(shown.shape, shown.dtype)].append(shown)
        self._depth[parameter] = max(0, depth - 1)


def _only_gathers_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # Subclasses may do more, and max_norm writes to the table.
    return type(module) is nn.Embedding and len(args) == 1 and not kwargs and module.max_norm is None
