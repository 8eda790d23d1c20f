"""State hash, version 1: a sum over elements modulo 2**64, so any split into slices adds up to the same number.

An element's bits are multiplied by two odd numbers, one of its place in a tile of 4096 and one of the tile in its
parameter. Odd factors make every single changed bit visible; two changes cancel with a chance of about 2**-31. It
guards against accidents, not against an adversary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_ds.maths import noise
from zo_ds.maths.directions import Site, chunks

HASH_VERSION = 1
_MASK32 = 0xFFFFFFFF


def element_weights(device: torch.device | None = None) -> Tensor:
    """int64 [4096]: an odd 32-bit number for each place in a tile, the mixer of C. Wellons ("lowbias32")."""
    x = (torch.arange(noise.TILE, dtype=torch.int64, device=device) + 0x9E3779B9) & _MASK32
    # Products of 32-bit numbers wrap in int64, and their low halves survive it.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return (x ^ (x >> 16)) | 1


def tile_weight(param_id: int, tile: int) -> int:
    """Odd 64-bit factor of a tile."""
    return noise.splitmix64((noise.splitmix64(param_id) + tile) & 0xFFFFFFFFFFFFFFFF) | 1


def state_hash(theta: Tensor, site: Site) -> int:
    """A slice's part of the hash of the weights.

    Args:
        theta: contiguous slice, fp32 / bf16 / fp16.
        site: where it lies; only its parameter and start matter.

    Returns:
        0 .. 2**64 - 1. The parts of all slices of all parameters, added modulo 2**64, are the hash of the weights.
    """
    flat, total = theta.view(-1), 0
    words = torch.int32 if theta.dtype == torch.float32 else torch.int16
    weights = element_weights(theta.device)
    mask = _MASK32 if theta.dtype == torch.float32 else 0xFFFF
    for at, count in chunks(site.start, flat.numel()):
        first = at // noise.TILE
        bits = flat.narrow(0, at - site.start, count).view(words).to(torch.int64) & mask
        whole = bits.new_zeros((-(-(at + count) // noise.TILE) - first) * noise.TILE)
        whole.narrow(0, at - first * noise.TILE, count).copy_(bits)
        sums = (whole.view(-1, noise.TILE) * weights).sum(1)
        for tile, value in enumerate(sums.tolist(), first):
            total += value * tile_weight(site.param_id, tile)
    return total & 0xFFFFFFFFFFFFFFFF
