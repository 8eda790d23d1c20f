"""Whether two ways of running a model agree, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zo_ds.forward.perturber import Perturber

SAMPLES = 256
TOLERANCE = 2e-4
"""Of a layer's root mean square, in fp32. A missing or wrong direction shows at about eps, 1e-3."""
TOLERANCE_16_BIT = 0.1


@dataclass(frozen=True)
class Difference:
    """The first layer that differs.

    Attributes:
        layer: its name.
        number: of the place.
        sequential, batched: the values that differ most.
    """

    layer: str
    number: int
    sequential: float
    batched: float


class Trace:
    """Samples of every layer's output while a model runs, for some places.

    Args:
        module: the model.
        numbers: of the places that matter.
        perturber: knows how many places run together.
        current: number of the place whose loss is being computed.
    """

    def __init__(
        self, module: nn.Module, numbers: Sequence[int], perturber: Perturber, current: Callable[[], int]
    ) -> None:
        self._module, self._numbers, self._perturber, self._current = module, numbers, perturber, current
        self._hooks: list[Any] = []
        self.outputs: dict[tuple[int, str, int], tuple[Tensor, float]] = {}
        """By (place, layer, how often it ran before): sampled elements, root mean square of all."""
        self._runs: dict[tuple[int, str], int] = {}

    def __enter__(self) -> Trace:
        for name, child in self._module.named_modules():
            self._hooks.append(child.register_forward_hook(lambda _, __, output, name=name: self._note(name, output)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, output: Any) -> None:
        tensor = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
        if tensor is None or tensor.numel() == 0:
            return
        first, count = self._perturber.running
        if count == 1:
            self._keep(self._current(), name, tensor)
            return
        for number in self._numbers:
            if count and first <= number < first + count and tensor.shape[0] % count == 0:
                self._keep(number, name, tensor.chunk(count)[number - first])

    def _keep(self, number: int, name: str, tensor: Tensor) -> None:
        if number not in self._numbers:
            return
        run = self._runs.get((number, name), 0)
        self._runs[number, name] = run + 1
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].double().cpu()
        self.outputs[number, name, run] = (sample, float(flat.float().square().mean().sqrt()))


def compare(sequential: Trace, batched: Trace, *, exact: bool) -> Difference | None:
    """The first layer, in the order in which the sequential model ran them, that differs; None if none does."""
    tolerance = TOLERANCE if exact else TOLERANCE_16_BIT
    for (number, layer, run), (values, scale) in sequential.outputs.items():
        other = batched.outputs.get((number, layer, run))
        if other is None or other[0].shape != values.shape:
            continue
        gap = (values - other[0]).abs()
        worst = int(gap.argmax())
        if not torch.equal(values, other[0]) and not float(gap[worst]) <= tolerance * scale:
            return Difference(layer, number, float(values[worst]), float(other[0][worst]))
    return None
