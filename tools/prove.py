"""A step on tensors without memory: every allocation of the real model's and evaluator's code, counted against a plan.

Shapes are real, values are not: what asks for a value gets a constant. Kernels that are fused on a GPU (attention, the
ops of zo_ds) are stood in for by what they allocate; of a matrix that is displaced block by block the first and the
last block are run, since those between allocate alike. CUDA's autocast policy is put in where the weights are 16-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from meter import META, Meter
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from zo_ds.forward import leaves, replicas
from zo_ds.forward.batched import BatchedEvaluator
from zo_ds.forward.displacement import Displacement, Place
from zo_ds.forward.joining import PassSize
from zo_ds.forward.loss import model_loss
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.maths.directions import NoiseStructure
from zo_ds.planning.placement import Placement
from zo_ds.planning.shapes import ModelShapes, blocks_of
from zo_ds.stores.base import trainable_parameters


@dataclass(frozen=True)
class Proof:
    """What one or more steps allocated.

    Attributes:
        peak: most bytes alive at once.
        parts: of that moment, by kind: weights, activations, scratch.
        highest: most bytes of each kind, at whatever moment.
        largest: bytes of the largest single allocation, weights and scratch included.
        largest_is: its kind and the operation that made it.
        steady: most bytes alive in the steps after the first.
        steps: that were run.
    """

    peak: int
    parts: Mapping[str, int]
    highest: Mapping[str, int]
    largest: int
    largest_is: str
    steady: int
    steps: int


_LOW = {F.linear, torch.matmul, torch.bmm, torch.addmm, torch.mm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__}
_FULL = {F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, F.cross_entropy, F.log_softmax, torch.log_softmax}


class _Device(TorchFunctionMode):
    """What a GPU does otherwise than the meta device: fused attention, and autocast for 16-bit weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        half = self._dtype != torch.float32
        if func is F.scaled_dot_product_attention:
            return self._attention(*args[:3])
        if half and func in _LOW:
            args, kwargs = self._cast((args, kwargs), self._dtype)
        elif half and func in _FULL:
            args, kwargs = self._cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = self._cast((query, key, value), self._dtype)
        examples, heads, tokens, _ = query.shape
        result = torch.empty((examples, tokens, heads, value.shape[-1]), dtype=query.dtype, device=META)
        torch.empty((examples, heads, tokens), dtype=torch.float32, device=META)  # the log-sum-exp of the kernel
        return result.transpose(1, 2)

    @staticmethod
    def _cast(tree: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


class Residency:
    """ZeRO-3 as planned: a unit's weights are allocated from its fetch to its release, resident ones always.

    Args:
        model: whose modules are hooked.
        shapes: of it.
        placement: the plan.
        dtype_bytes: of one element of a matrix.
        meter: counts.
    """

    def __init__(
        self, model: nn.Module, shapes: ModelShapes, placement: Placement, dtype_bytes: int, meter: Meter
    ) -> None:
        self._units = {unit.name: unit for unit in shapes.units}
        self._order, self._size, self._meter = shapes.order, dtype_bytes, meter
        self._resident = set(placement.resident_units)
        away = [unit.bytes(dtype_bytes) for unit in shapes.units if unit.name not in self._resident]
        self._ahead = placement.device["streamed"] - max(away, default=0)
        self._held: dict[str, list[Tensor]] = {}
        self._users: dict[str, int] = {}
        self._of = {name: unit.name for unit in shapes.units for name in unit.parameters}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        always = [unit.bytes(dtype_bytes) for unit in shapes.units if unit.name in self._resident]
        always += [placement.device["shards"], placement.device["buffers"]]
        self._always = [self._allocate(count) for count in always if count]
        self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        blocks = dict(blocks_of(model))
        inside = {child for block in blocks.values() for child in block.modules()}
        at = 0
        for name, module in model.named_modules():
            if name not in blocks and (module in inside or not any(True for _ in module.parameters(recurse=False))):
                continue
            used = [name] if name in blocks else self._units_of(module.parameters(recurse=False))
            position = at
            at += len(used)
            module.register_forward_pre_hook(lambda _, __, used=used, at=position: self._enter(used, at))
            module.register_forward_hook(lambda _, __, ___, used=used: self._leave(used), always_call=True)
        assert at == len(self._order), "modules are not read in the planner's order"

    def _units_of(self, parameters: Iterator[nn.Parameter]) -> list[str]:
        return list(dict.fromkeys(self._of[self._names[p]] for p in parameters))

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Units of these parameters stay within this context."""
        used = self._units_of(iter(parameters))
        self._enter(used, len(self._order))
        try:
            yield
        finally:
            self._leave(used)

    def _allocate(self, count: int) -> Tensor:
        with self._meter.counting("weights"):
            return torch.empty(count, dtype=torch.uint8, device=META)

    def _enter(self, used: list[str], at: int) -> None:
        for name in used:
            self._users[name] = self._users.get(name, 0) + 1
            self._fetch(name, self._units[name].bytes(self._size))
        # What was fetched ahead and is still waiting counts, as in DeepSpeed's limit of live parameters.
        left = self._ahead - sum(self._bytes(name) for name in self._held if not self._users.get(name))
        for name in self._order[at + len(used) :]:
            if name in self._resident or self._users.get(name):
                continue
            before = self._bytes(name)
            more = min(left, self._units[name].bytes(self._size) - before)
            if left <= 0:
                break
            self._fetch(name, before + more)
            left -= more

    def _bytes(self, name: str) -> int:
        return sum(tensor.numel() for tensor in self._held.get(name, []))

    def _fetch(self, name: str, wanted: int) -> None:
        """Hold so many bytes of a unit."""
        missing = wanted - self._bytes(name)
        if missing > 0 and name not in self._resident:
            self._held.setdefault(name, []).append(self._allocate(missing))

    def _leave(self, used: list[str]) -> None:
        for name in used:
            self._users[name] -= 1
            if not self._users[name]:
                self._held.pop(name, None)


@contextmanager
def _as_on_a_gpu(dtype: torch.dtype, meter: Meter) -> Iterator[None]:
    """Stand-ins that see no tensors: dtypes under autocast, ends of block sequences, and what counts as scratch."""

    def scratch(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with meter.counting("scratch"):
                return original(*args, **kwargs)

        return run

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(replicas.Scratch, "take", scratch(replicas.Scratch.take)))
        enter(mock.patch.object(Perturber, "_show", scratch(Perturber._show)))
        enter(mock.patch.object(replicas.Replicas, "blocks", _ends))
        # A meta parameter does not take the data of an inference tensor, and composite operations would come whole.
        enter(mock.patch.object(torch, "inference_mode", torch.no_grad))
        enter(mock.patch.object(leaves, "compute_dtype", _always(dtype)))
        if dtype != torch.float32:
            enter(mock.patch.object(leaves, "norm_dtype", _always(torch.float32)))
        enter(_Device(dtype))
        yield


def _always(dtype: torch.dtype) -> Callable[[Tensor], torch.dtype]:
    # A mock would keep the tensors that it was called with.
    return lambda _: dtype


def _ends(self: replicas.Replicas, weight: Tensor, *, whole: bool = False) -> Iterator[tuple[slice, replicas.Block]]:
    """`Replicas.blocks`, without those between the first and the last."""
    theta = self.theta(weight)
    rows, columns = theta.shape
    step = rows if whole else max(1, replicas.BLOCK_ELEMENTS // columns)
    for start in dict.fromkeys((0, (rows - 1) // step * step)):
        part = slice(start, min(rows, start + step))
        yield part, replicas.Block(theta[part], self.site(weight, start * columns))


def prove(
    model: nn.Module,
    placement: Placement,
    *,
    examples: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    labelled: int | None = None,
    noise: NoiseStructure = NoiseStructure.DENSE,
    steps: int = 2,
) -> Proof:
    """Run steps of a causal LM on the meta device, as the plan places it.

    Args:
        model: on the meta device, in this dtype; it is changed.
        placement: made for its shapes.
        examples: of one unit of work.
        tokens: of each of them.
        dtype: of matrices and activations.
        labelled: positions that reach the head; None: all.
        noise: how directions are built.
        steps: the first one also checks the batched losses against sequential ones.
    """
    shapes = ModelShapes.of(model)
    parameters = trainable_parameters(model)
    meter = Meter(examples * tokens if labelled is None else labelled)
    for tensor in (*model.parameters(), *model.buffers()):
        meter.ignore(tensor)
    places: list[Place] = [None, *(Displacement(1, i, 1e-3) for i in range(placement.places - 1))]
    perturber = Perturber(model, parameters, noise)
    reference = SequentialEvaluator(model, perturber, model_loss, None)
    with meter, _as_on_a_gpu(dtype, meter):
        residency = Residency(model, shapes, placement, dtype.itemsize, meter)
        evaluator = BatchedEvaluator(
            reference, pass_size=PassSize(placement.replicas_per_pass), gathered=residency.gathered
        )
        ids = torch.zeros((examples, tokens + 1), dtype=torch.int64, device=META)[:, 1:]
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
        evaluator.losses(batch, places)
        peak, parts = meter.peak, dict(meter.parts)
        meter.start()
        for _ in range(steps - 1):
            evaluator.losses(batch, places)
    if meter.peak > peak:
        peak, parts = meter.peak, dict(meter.parts)
    return Proof(peak, parts, dict(meter.highest), meter.largest, meter.largest_is, meter.peak, steps)
