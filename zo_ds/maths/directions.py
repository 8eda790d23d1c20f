"""Directions u_i as the update and the forward meet them: scaled, for any slice of a parameter, of any structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from zo_ds.maths import noise

CHUNK = 256 * noise.TILE
"""Elements worked on at a time: what fits the second-level cache in fp32."""


class NoiseStructure(str, Enum):
    """How directions are built.

    ``dense``: independent signs. ``factored``: a matrix of signs ``a b^T``; vectors stay dense. ``gaussian``:
    independent standard normals, of matrices and vectors alike (MeZO, arXiv 2305.17333).
    """

    DENSE = "dense"
    FACTORED = "factored"
    GAUSSIAN = "gaussian"


@dataclass(frozen=True)
class ParamInfo:
    """What the noise and the journal know of a parameter.

    Attributes:
        name: canonical name in the base model; tied parameters share the first one.
        shape: of the whole, unsharded parameter.
        dtype: how the weights are held.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def param_id(self) -> int:
        """The parameter's word of the noise counter."""
        return noise.param_id(self.name)

    @property
    def numel(self) -> int:
        """Number of elements of the whole parameter."""
        return int(torch.Size(self.shape).numel())

    @property
    def is_matrix(self) -> bool:
        """True if weight decay applies and noise may be factored: two dimensions or more."""
        return len(self.shape) >= 2

    def site(self, structure: NoiseStructure, start: int = 0) -> Site:
        """Where a slice that begins at element ``start`` of this parameter lies in the noise."""
        factored = structure is NoiseStructure.FACTORED and self.is_matrix and self.numel > 0
        columns, gaussian = self.numel // self.shape[0] if factored else 0, structure is NoiseStructure.GAUSSIAN
        return Site(self.param_id, start, columns, self.is_matrix, gaussian)


@dataclass(frozen=True)
class Site:
    """Where a contiguous slice of a parameter lies in the noise.

    Attributes:
        param_id: see `noise.param_id`.
        start: index of its first element in the whole parameter.
        columns: length of a row of the whole parameter if its directions are factored, 0 if they are dense.
        decays: whether weight decay applies.
        gaussian: whether its directions are standard normals and not signs; columns is 0 then.
    """

    param_id: int
    start: int = 0
    columns: int = 0
    decays: bool = False
    gaussian: bool = False


def chunks(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut elements ``start .. start + count - 1`` at multiples of `CHUNK`; yields (start, count)."""
    end = start + count
    while start < end:
        stop = min(end, (start // CHUNK + 1) * CHUNK)
        yield start, stop - start
        start = stop


def scaled_directions(
    site: Site,
    seed: int,
    directions: Sequence[int],
    scales: Sequence[float],
    start: int,
    count: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """``scale_i * u_i`` of a slice, one fp32 [count] tensor for each direction in order.

    Args:
        site: whose elements; its own start is not used.
        seed: step seed.
        directions: N numbers.
        scales: N factors; each is rounded to fp32. Multiplying it by a sign is exact; its product with a normal is
            rounded to fp32.
        start: first element of the slice in the whole parameter.
        count: elements of the slice.
        device: where the result is wanted.
    """
    if site.columns:
        yield from _factored(site, seed, directions, scales, start, count, device)
        return
    if site.gaussian:
        normals = noise.normal_table(device)
        for direction, scale in zip(directions, scales, strict=True):
            words = noise.half_words(
                seed, site.param_id, direction, start, count, stream=noise.Stream.GAUSSIAN, device=device
            )
            yield (normals * scale).index_select(0, words)
        return
    first = start // noise.TILE
    tiles = -(-(start + count) // noise.TILE) - first
    packed = noise.sign_bytes(seed, site.param_id, directions, first, tiles, device=device)
    table = noise.sign_table(device)
    for row, scale in enumerate(scales):
        yield (table * scale).index_select(0, packed[row]).view(-1).narrow(0, start - first * noise.TILE, count)


def _factored(
    site: Site,
    seed: int,
    directions: Sequence[int],
    scales: Sequence[float],
    start: int,
    count: int,
    device: torch.device,
) -> Iterator[Tensor]:
    columns = site.columns
    first_row, last_row = start // columns, (start + count - 1) // columns
    rows = last_row - first_row + 1
    left, right = noise.Stream.LEFT, noise.Stream.RIGHT
    for direction, scale in zip(directions, scales, strict=True):
        a = noise.signs(seed, site.param_id, direction, first_row, rows, stream=left, device=device)
        b = noise.signs(seed, site.param_id, direction, 0, columns, stream=right, device=device)
        yield torch.outer(a * scale, b).view(-1).narrow(0, start - first_row * columns, count)
