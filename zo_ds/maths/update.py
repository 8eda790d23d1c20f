"""Perturbation and update, version 1: theta + eps*u, and theta <- round(theta*(1 - decay) - sum_i c_i u_i).

Both work on a slice of a parameter, accumulate in fp32 in the order of the terms and round once, so that neither
shards, devices nor chunks change a bit. Products of signs and scalars are exact: no fused multiply-add can make a
difference. Products of normals are not, and are rounded to fp32 before they are added: every implementation keeps the
two roundings apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from zo_ds.maths import noise
from zo_ds.maths.directions import Site, chunks, scaled_directions

UPDATE_VERSION = 1


@dataclass(frozen=True)
class Term:
    """One direction of an update: subtract ``coefficient * u``.

    Attributes:
        step: the step whose noise the direction comes from (older steps serve momentum over past directions).
        direction: its number in that step.
        coefficient: in weight units, an fp32 value.
    """

    step: int
    direction: int
    coefficient: float


@dataclass(frozen=True)
class Update:
    """All that changes theta in one step, identical on every replica.

    Attributes:
        step: keys the bits of stochastic rounding.
        terms: subtracted in this order.
        decay: lr * weight_decay, applied to matrices (two dimensions or more) only: norm weights and biases are not
            pulled towards zero.
    """

    step: int
    terms: tuple[Term, ...]
    decay: float = 0.0

    @property
    def shrink(self) -> float:
        """What decaying weights are multiplied by: fp32(1 - decay), the difference taken in fp64."""
        return float(torch.tensor(1.0 - self.decay, dtype=torch.float32))


def perturb(theta: Tensor, site: Site, seed: int, direction: int, eps: float, *, out: Tensor | None = None) -> Tensor:
    """``theta + eps * u`` of a slice, out of place, rounded to nearest.

    Args:
        theta: contiguous slice of a parameter, any shape, fp32 / bf16 / fp16.
        site: where it lies in the noise.
        seed: step seed.
        direction: number of the direction.
        eps: radius, signed (two-sided estimators evaluate at -eps too).
        out: where to write, contiguous, of theta's shape, in its dtype or fp32; made anew in its dtype if None.
    """
    out = torch.empty_like(theta) if out is None else out
    flat_in, flat_out = theta.view(-1), out.view(-1)
    for at, count in chunks(site.start, theta.numel()):
        (noise_chunk,) = scaled_directions(site, seed, [direction], [eps], at, count, theta.device)
        source = flat_in.narrow(0, at - site.start, count)
        flat_out.narrow(0, at - site.start, count).copy_(noise_chunk.add_(source))
    return out


def step_(
    theta: Tensor,
    site: Site,
    seeds: Sequence[int],
    directions: Sequence[int],
    coefficients: Sequence[float],
    shrink: float,
    rounding_seed: int,
) -> None:
    """``theta <- round(theta * shrink - sum_i c_i u_i)`` in place, the terms in order.

    Args:
        theta: contiguous slice of a parameter, fp32 (rounded to nearest) or bf16 / fp16 (stochastic rounding).
        site: where it lies in the noise.
        seeds: step seed of each term.
        directions: direction of each term.
        coefficients: fp32 value of each term, in weight units.
        shrink: fp32 factor; not applied where the site does not decay.
        rounding_seed: step seed that keys stochastic rounding.
    """
    flat = theta.view(-1)
    terms = list(zip(seeds, directions, coefficients, strict=True))
    for at, count in chunks(site.start, flat.numel()):
        piece = flat.narrow(0, at - site.start, count)
        total = piece.to(torch.float32, copy=True)
        if site.decays and shrink != 1.0:
            total.mul_(shrink)
        for seed, group in groupby(terms, key=lambda term: term[0]):
            _, numbers, scales = zip(*group, strict=True)
            for scaled in scaled_directions(site, seed, numbers, scales, at, count, theta.device):
                total.sub_(scaled)
        if theta.dtype == torch.float32:
            piece.copy_(total)
        else:
            bits = noise.rounding_bits(rounding_seed, site.param_id, at, count, device=theta.device)
            piece.copy_(round_stochastically(total, theta.dtype, bits))


def apply_update_(theta: Tensor, site: Site, run_seed: int, update: Update) -> None:
    """Apply one update in place to a slice of a parameter, see `step_`; with the run seed its steps give the noise."""
    seeds = [noise.step_seed(run_seed, term.step) for term in update.terms]
    directions, coefficients = [t.direction for t in update.terms], [t.coefficient for t in update.terms]
    step_(theta, site, seeds, directions, coefficients, update.shrink, noise.step_seed(run_seed, update.step))


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round fp32 to a 16-bit format, up in magnitude with the probability of the fraction that is cut off.

    The fraction is taken to 16 binary places and compared with 16 random bits: exact for normal numbers of both
    formats, short by less than 2**-16 of a unit for fp16 subnormals. Infinities and NaNs pass through.

    Args:
        values: fp32, any shape.
        dtype: torch.bfloat16 or torch.float16.
        bits: int32 of the same shape, 0..65535, see `noise.rounding_bits`.

    Raises:
        ValueError: dtype is another format.
    """
    if dtype == torch.bfloat16:
        rounded = ((values.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    elif dtype == torch.float16:
        rounded = ((values.view(torch.int32) + (bits >> 3)) & -0x2000).view(torch.float32)
        rounded = torch.where(values.abs() < 2.0**-14, _round_subnormal_half(values, bits), rounded)
    else:
        raise ValueError(f"stochastic rounding is defined for bfloat16 and float16, not {dtype}")
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _round_subnormal_half(values: Tensor, bits: Tensor) -> Tensor:
    units = values.abs() * 2.0**24
    whole = units.floor()
    up = ((units - whole) * 65536.0).floor() + bits >= 65536.0
    return torch.copysign((whole + up) * 2.0**-24, values)
