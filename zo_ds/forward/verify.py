"""Whether two ways of running a model agree, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zo_ds.forward.perturber import Perturber

ROWS, COLUMNS = 16, 64
TOLERANCE = 2e-4
"""Of a layer's or the losses' root mean square, in fp32. A missing or wrong direction shows at about eps, 1e-3."""
TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class Difference:
    """The first layer that differs.

    Attributes:
        layer: its name.
        number: of the place.
        sequential, batched: the values that differ most, or their shapes.
    """

    layer: str
    number: int
    sequential: str
    batched: str


class _Sample(NamedTuple):
    values: Tensor
    shape: tuple[int, ...]
    scale: float


JointSamples = dict[int, list[tuple[str, _Sample | None]]]
"""By place: layers in the order in which they ran; None for those that give the same to all places."""


class Trace:
    """Samples of every layer's output while a model runs, for some places.

    Args:
        module: the model.
        numbers: of the places that matter.
        perturber: knows which places run together.
        current: number of the place whose loss is being computed.
    """

    def __init__(
        self, module: nn.Module, numbers: Sequence[int], perturber: Perturber, current: Callable[[], int]
    ) -> None:
        self._module, self._numbers, self._perturber, self._current = module, numbers, perturber, current
        self._hooks: list[Any] = []
        self._runs: dict[tuple[int, str], int] = {}
        self._seen: JointSamples = {}
        self.outputs: dict[tuple[int, str, int], _Sample] = {}
        """By (place, layer, how often it ran before)."""

    def __enter__(self) -> Trace:
        for name, child in self._module.named_modules():
            self._hooks.append(child.register_forward_hook(lambda _, __, output, name=name: self._note(name, output)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def take_joint(self) -> JointSamples:
        """What was seen of places that ran together since the last time."""
        seen, self._seen = self._seen, {}
        return seen

    def serve(self, number: int, samples: JointSamples) -> None:
        """A place's loss comes from what ran together."""
        for name, sample in samples.get(number, []):
            self._keep(number, name, sample)

    def _note(self, name: str, output: Any) -> None:
        tensor = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
        joined = self._perturber.joined
        if tensor is None or tensor.dim() == 0 or tensor.numel() == 0 or self._perturber.within_one:
            return
        if joined is None:
            self._keep(self._current(), name, _sampled(tensor))
            return
        for number in self._numbers:
            if 0 <= number - joined.first < joined.count:
                divided = tensor.shape[0] % joined.count == 0
                own = _sampled(tensor.chunk(joined.count)[number - joined.first]) if divided else None
                self._seen.setdefault(number, []).append((name, own))

    def _keep(self, number: int, name: str, sample: _Sample | None) -> None:
        if number in self._numbers:
            run = self._runs.get((number, name), 0)
            self._runs[number, name] = run + 1
            if sample is not None:
                self.outputs[number, name, run] = sample


def _sampled(tensor: Tensor) -> _Sample:
    rows = tensor.reshape(tensor.shape[0], -1)
    columns = rows[:ROWS, :: max(1, rows.shape[1] // COLUMNS)][:, :COLUMNS]
    return _Sample(columns.double().cpu(), tuple(tensor.shape), float(tensor.float().square().mean().sqrt()))


def compare(sequential: Trace, batched: Trace, *, exact: bool) -> Difference | None:
    """The first layer, in the order in which the sequential model ran them, that differs; None if none does.

    A layer that runs once for each replica, within another one, is not looked at; what that one gives is.

    Args:
        sequential: some places, one at a time.
        batched: the same ones together.
        exact: fp32 rather than 16 bits.
    """
    tolerance = TOLERANCE if exact else TOLERANCE_16_BIT
    for (number, layer, run), one in sequential.outputs.items():
        other = batched.outputs.get((number, layer, run))
        if other is None:
            continue
        # Positions are looked up once for all examples, or for each.
        if one.shape[1:] != other.shape[1:] or one.shape[0] not in (1, other.shape[0]):
            return Difference(layer, number, f"shape {one.shape}", f"shape {other.shape}")
        gap = (one.values - other.values).square()
        if not one.values.isfinite().all() and one.values.shape == other.values.shape:
            continue
        if not float(gap.mean().sqrt()) <= tolerance * one.scale:
            worst = int(gap.argmax())
            values = (sample.values.expand_as(gap).flatten()[worst] for sample in (one, other))
            return Difference(layer, number, *(f"{float(value):.9g}" for value in values))
    return None


def losses_differ(sequential: Sequence[Tensor], batched: Sequence[Tensor], *, exact: bool) -> bool:
    """Whether the mean losses of some places differ by more than rounding."""
    tolerance = TOLERANCE if exact else TOLERANCE_16_BIT
    for one, other in zip(sequential, batched, strict=True):
        if one.shape != other.shape:
            return True
        gap = float((one.mean() - other.mean()).abs())
        scale = max(float(place.abs().mean()) for place in sequential)
        if not gap <= tolerance * scale and bool(one.isfinite().all()):
            return True
    return False
