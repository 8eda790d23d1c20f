"""R displaced copies of the parameters, made piece by piece as the layers of a batched forward ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zo_ds.forward.axes import BATCHED, Axes, Axis, tensors_of
from zo_ds.forward.displacement import Place
from zo_ds.maths.directions import NoiseStructure, ParamInfo, Site
from zo_ds.maths.noise import Stream, sign_table
from zo_ds.ops import api as ops

BLOCK_ELEMENTS = 2**20
"""Weights displaced at a time: written and read again before they leave the cache."""
RESOLVED_EPS = 5e-4
"""Below this, theta + eps * u in 16 bits rounds much of eps away."""


class Scratch:
    """Memory that is used again and again; one flat tensor for each dtype, device and use."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """So many elements, with whatever the last user left in them; "zeros" are zero, and stay so."""
        key = (use, dtype, device)
        if key not in self._held or self._held[key].numel() < count:
            self._held[key] = torch.zeros(count, dtype=dtype, device=device)
        return self._held[key][:count]


class Block(NamedTuple):
    """Some rows of a matrix.

    Attributes:
        theta: [rows, columns], contiguous.
        site: where they lie in the noise.
    """

    theta: Tensor
    site: Site


class LostAxisError(Exception):
    """A layer was given something that is not replica-major."""


@dataclass(frozen=True)
class Together:
    """What flows through the model at once.

    Attributes:
        places: R of them, of one step seed.
        examples: first axis of each replica's own inputs.
        tokens: of each example.
        first: number of the first place in the step.
    """

    places: tuple[Place, ...]
    examples: int = 1
    tokens: int = 1
    first: int = 0

    @property
    def count(self) -> int:
        """R."""
        return len(self.places)

    def length(self, axis: Axis) -> int:
        """First axis of a replica-major tensor."""
        return self.count * self.examples * (self.tokens if axis is Axis.TOKENS else 1)


class Replicas:
    """What a layer sees of R places at once.

    Args:
        together: the places.
        infos: what is displaced.
        structure: how directions are built.
        scratch: for displaced blocks.
        originals: theta of parameters whose ``.data`` is a displaced copy at present.
        axes: what is known of modules' inputs.
    """

    def __init__(
        self,
        together: Together,
        infos: Mapping[Any, ParamInfo],
        structure: NoiseStructure,
        scratch: Scratch,
        originals: Mapping[Any, Tensor],
        axes: Mapping[nn.Module, Axes],
    ) -> None:
        self.together, self.places, self.structure = together, together.places, structure
        self._infos, self._scratch, self._originals, self._axes = infos, scratch, originals, axes
        # A clean replica is one whose noise is multiplied by zero.
        self._seed = next((place.seed for place in self.places if place is not None), 0)
        self._directions = [0 if place is None else place.direction for place in self.places]
        self._radii = [0.0 if place is None else place.eps for place in self.places]

    @property
    def count(self) -> int:
        """R."""
        return len(self.places)

    @property
    def radii(self) -> list[float]:
        """The eps of each replica, 0 for a clean one."""
        return self._radii

    def check(self, module: nn.Module, x: Tensor) -> None:
        """Refuse activations that are not replica-major.

        Raises:
            LostAxisError: naming the kind of module.
        """
        if self.count > 1 and (x.dim() == 0 or x.shape[0] not in self._lengths(module)):
            raise LostAxisError(f"the input of a {type(module).__name__} has lost the batch axis: {tuple(x.shape)}")

    def is_shared(self, module: nn.Module, x: Tensor) -> bool:
        """Whether an input is given once for all examples of all replicas."""
        known = self._axes.get(module)
        if known:
            return known[0] is Axis.NONE
        return x.dim() == 0 or x.shape[0] not in self._lengths(module)

    def batched(self, module: nn.Module, inputs: Any) -> list[bool]:
        """For each leaf of a call's inputs, whether it is a replica-major tensor."""
        leaves, tensors = tree_leaves(inputs), tensors_of(inputs)
        known = self._axes.get(module, ())
        if len(known) != len(tensors):
            known = tuple(Axis.EXAMPLES if t.shape[0] in self._lengths(module) else Axis.NONE for t in tensors)
        of = {id(tensor): axis for tensor, axis in zip(tensors, known, strict=True)}
        return [of.get(id(leaf)) in BATCHED for leaf in leaves]

    def _lengths(self, module: nn.Module) -> set[int]:
        known = [axis for axis in self._axes.get(module, ())[:1] if axis in BATCHED]
        return {self.together.length(axis) for axis in known or BATCHED}

    def displaces(self, parameter: Tensor | None) -> bool:
        """Whether any replica sees it displaced."""
        return parameter is not None and parameter in self._infos and any(self._radii)

    def theta(self, parameter: Tensor) -> Tensor:
        """The weights themselves, contiguous."""
        return self._originals.get(parameter, parameter.data).contiguous()

    def site(self, parameter: Tensor, start: int = 0) -> Site:
        """Where a slice of it lies in the noise."""
        return self._infos[parameter].site(self.structure, start)

    def loses_eps(self, dtype: torch.dtype) -> bool:
        """Whether displaced weights in this dtype would lose much of eps."""
        return dtype.itemsize == 2 and min(abs(eps) for eps in self._radii if eps) <= RESOLVED_EPS

    def all(self, parameter: Tensor) -> Tensor:
        """Every replica's copy, fp32 [R, *shape]; for small parameters."""
        theta = self.theta(parameter)
        if not self.displaces(parameter):
            return theta.float().expand(self.count, *theta.shape)
        out = torch.empty((self.count, *theta.shape), dtype=torch.float32, device=theta.device)
        return ops.perturb(theta, self.site(parameter), self._seed, self._directions, self._radii, out=out)

    def rows(self, table: Tensor, ids: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Rows of a table as every replica sees them, [R, *ids, width]."""
        theta = self.theta(table)
        out = torch.empty((self.count, *ids.shape, theta.shape[1]), dtype=out_dtype, device=theta.device)
        return ops.embedding_rows(
            theta, ids.long(), self.site(table), self._seed, self._directions, self._radii, out=out
        )

    def blocks(self, weight: Tensor, *, whole: bool = False) -> Iterator[tuple[slice, Block]]:
        """A matrix's rows, a block at a time, so that its copies are used while they are in the cache.

        Args:
            weight: [rows, columns].
            whole: all rows in one block.
        """
        theta = self.theta(weight)
        rows, columns = theta.shape
        step = rows if whole else max(1, BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            rows_of_block = slice(start, min(rows, start + step))
            yield rows_of_block, Block(theta[rows_of_block], self.site(weight, start * columns))

    def signs(self, parameter: Tensor, stream: Stream, count: int, dtype: torch.dtype) -> Tensor:
        """Each replica's signs of a factored matrix's side, [R, count]."""
        site, device = Site(self._infos[parameter].param_id), parameter.device
        packed = ops.signs(site, self._seed, self._directions, count, stream=stream, device=device)
        table = sign_table(device).to(dtype)
        return table.index_select(0, packed.view(-1).int()).view(self.count, -1)[:, :count]

    def copy(self, number: int, block: Block) -> Tensor:
        """Replica number i's copy of a block; the next call overwrites it."""
        if not self._radii[number]:
            return block.theta
        return self._displaced(number, block, block.theta, self._radii[number])

    def noise(self, number: int, block: Block) -> Tensor:
        """Replica number i's direction u for a block, in its dtype; overwritten like a copy.

        Signs are exact. Normals are rounded to nearest, as every factor of a product in that dtype is: the loss is
        taken along a direction that differs from the update's by 0.17 % of its length in bf16 and by 0.02 % in fp16.
        The mean of an estimate does not notice: E[z round(z)] is 1 - 1.1e-6 and 1 + 1.5e-6.
        """
        zeros = self._scratch.take("zeros", block.theta.numel(), block.theta.dtype, block.theta.device)
        return self._displaced(number, block, zeros.view(block.theta.shape), 1.0)

    def _displaced(self, number: int, block: Block, theta: Tensor, eps: float) -> Tensor:
        out = self._scratch.take("block", theta.numel(), theta.dtype, theta.device).view(1, *theta.shape)
        return ops.perturb(theta, block.site, self._seed, [self._directions[number]], [eps], out=out)[0]
