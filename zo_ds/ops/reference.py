"""The ops by the maths layer's torch functions: on any device, where nothing is compiled, and as the tests' oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_ds.maths import hashing, noise, update
from zo_ds.maths.directions import Site
from zo_ds.ops.plan import signed

_MASK64 = 0xFFFFFFFFFFFFFFFF


@torch.no_grad()
def perturb_(
    out: Tensor,
    theta: Tensor,
    seed: int,
    param: int,
    directions: Sequence[int],
    eps: Sequence[float],
    start: int,
    columns: int,
    gaussian: bool,
) -> None:
    """See `zo_ds.ops.api.perturb`."""
    site = Site(param, start, columns, gaussian=gaussian)
    for row, direction, radius in zip(out.view(len(directions), theta.numel()), directions, eps, strict=True):
        update.perturb(theta.view(-1), site, seed & _MASK64, direction, radius, out=row)


@torch.no_grad()
def embedding_rows_(
    out: Tensor,
    table: Tensor,
    ids: Tensor,
    seed: int,
    param: int,
    directions: Sequence[int],
    eps: Sequence[float],
    factored: bool,
    gaussian: bool,
) -> None:
    """See `zo_ds.ops.api.embedding_rows`."""
    width = table.shape[1]
    rows = out.view(len(directions), ids.numel(), width)
    for place, row in enumerate(ids.view(-1).tolist()):
        start, columns = row * width, width if factored else 0
        for replica, (direction, radius) in enumerate(zip(directions, eps, strict=True)):
            site = Site(param, start, columns, gaussian=gaussian)
            update.perturb(table[row], site, seed & _MASK64, direction, radius, out=rows[replica, place])


@torch.no_grad()
def update_(
    thetas: Sequence[Tensor],
    params: Sequence[int],
    starts: Sequence[int],
    columns: Sequence[int],
    gaussian: Sequence[bool],
    decays: Sequence[bool],
    term_counts: Tensor,
    shrinks: Tensor,
    rounding_seeds: Tensor,
    seeds: Tensor,
    directions: Tensor,
    coefficients: Tensor,
) -> None:
    """See `zo_ds.ops.api.apply_`."""
    numbers = [seed & _MASK64 for seed in seeds.tolist()]
    terms = list(zip(numbers, directions.tolist(), coefficients.tolist(), strict=True))
    steps = list(zip(term_counts.tolist(), shrinks.tolist(), rounding_seeds.tolist(), strict=True))
    for theta, *place in zip(thetas, params, starts, columns, decays, gaussian, strict=True):
        site, begin = Site(*place), 0
        for count, shrink, rounding_seed in steps:
            own, numbers_, scales = zip(*terms[begin : begin + count], strict=True) if count else ((), (), ())
            update.step_(theta, site, own, numbers_, scales, shrink, rounding_seed & _MASK64)
            begin += count


def signs_(out: Tensor, seed: int, param: int, directions: Sequence[int], start: int, count: int, stream: int) -> None:
    """See `zo_ds.ops.api.signs`."""
    first = start // noise.TILE
    tiles = -(-(start + count) // noise.TILE) - first
    packed = noise.sign_bytes(
        seed & _MASK64, param, directions, first, tiles, stream=noise.Stream(stream), device=out.device
    )
    out.copy_(packed.narrow(1, (start - first * noise.TILE) // 8, out.shape[1]))


def state_hash(theta: Tensor, param: int, start: int) -> Tensor:
    """See `zo_ds.ops.api.state_hash`."""
    value = hashing.state_hash(theta, Site(param, start))
    return torch.tensor(signed(value), dtype=torch.int64, device=theta.device)
