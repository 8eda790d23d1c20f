"""What the layers above call: perturb, apply updates, look up embeddings, hash; the same bits as in the maths layer.

Every function checks its tensors and hands them to a torch op (``torch.ops.zo_ds``), which takes the compiled kernel of
their device, or the torch reference where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_ds.maths.directions import Site
from zo_ds.maths.noise import Stream
from zo_ds.ops import schema as schema  # registers the ops
from zo_ds.ops.plan import Plan, signed

_ops = torch.ops.zo_ds
_MASK64 = 0xFFFFFFFFFFFFFFFF
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def perturb(
    theta: Tensor,
    site: Site,
    seed: int,
    directions: Sequence[int],
    eps: Sequence[float],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``theta + eps_i * u_i`` for a block of R directions in one pass over a slice, rounded to nearest.

    Args:
        theta: contiguous slice of a parameter, any shape, fp32 / bf16 / fp16.
        site: where it lies in the noise.
        seed: step seed.
        directions: R direction numbers.
        eps: R radii, signed; rounded to fp32.
        out: where to write: contiguous [R, *theta.shape] in theta's dtype or fp32; made anew in theta's dtype if None.

    Raises:
        ValueError: a tensor has another shape, dtype or layout than said here.
    """
    if out is None:
        out = theta.new_empty((len(directions), *theta.shape))
    _check_floats(theta, "theta")
    _check_block(out, (len(directions), *theta.shape), theta, len(eps))
    arguments = (signed(seed), site.param_id, list(directions), list(eps), site.start, site.columns, site.gaussian)
    _ops.perturb_(out, theta, *arguments)
    return out


def embedding_rows(
    table: Tensor,
    ids: Tensor,
    site: Site,
    seed: int,
    directions: Sequence[int],
    eps: Sequence[float],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of a table under R directions; only the noise of those rows is made.

    Args:
        table: whole parameter [rows, width], contiguous.
        ids: int64, any shape, of rows.
        site: of the whole parameter.
        seed: step seed.
        directions: R direction numbers.
        eps: R radii, signed.
        out: contiguous [R, *ids.shape, width] in the table's dtype or fp32; made anew in the table's dtype if None.

    Raises:
        ValueError: a tensor has another shape, dtype or layout than said here.
        IndexError: an id is not a row (looked at on the CPU only).
    """
    _check_floats(table, "table")
    if table.dim() != 2 or ids.dtype != torch.int64 or site.start:
        raise ValueError("embedding_rows takes a whole table [rows, width] and int64 ids")
    # On a GPU the check would wait for the device.
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        raise IndexError(f"an id is outside 0..{table.shape[0] - 1}")
    shape = (len(directions), *ids.shape, table.shape[1])
    out = table.new_empty(shape) if out is None else out
    _check_block(out, shape, table, len(eps))
    arguments = (signed(seed), site.param_id, list(directions), list(eps), site.columns > 0, site.gaussian)
    _ops.embedding_rows_(out, table, ids.contiguous(), *arguments)
    return out


def apply_(thetas: Sequence[Tensor], sites: Sequence[Site], plan: Plan) -> None:
    """Apply the updates of a plan to many slices in place: one pass over each, however many updates there are.

    Equal, bit for bit, to applying one update after the other: each has its own rounding.

    Args:
        thetas: contiguous slices, fp32 / bf16 / fp16, on one device.
        sites: where they lie in the noise.
        plan: what to apply.

    Raises:
        ValueError: a tensor has another dtype or layout than said here.
    """
    for theta in thetas:
        _check_floats(theta, "theta")
    if len(thetas) != len(sites):
        raise ValueError(f"{len(thetas)} tensors for {len(sites)} sites")
    if not thetas:
        return
    _ops.update_(
        list(thetas),
        [site.param_id for site in sites],
        [site.start for site in sites],
        [site.columns for site in sites],
        [site.gaussian for site in sites],
        [site.decays for site in sites],
        plan.term_counts,
        plan.shrinks,
        plan.rounding_seeds,
        plan.seeds,
        plan.directions,
        plan.coefficients,
    )


def signs(
    site: Site,
    seed: int,
    directions: Sequence[int],
    count: int,
    *,
    stream: Stream = Stream.DENSE,
    device: torch.device | None = None,
) -> Tensor:
    """Packed signs of ``count`` elements from ``site.start`` on, a multiple of 8.

    Returns:
        uint8 [R, ceil(count / 8)]; bit b of byte k is the sign of element ``8 * k + b``, 1 meaning -1. Bits past the
        last element are those of the elements that would follow.

    Raises:
        ValueError: the start is not a multiple of 8.
    """
    if site.start % 8:
        raise ValueError(f"signs begin at a multiple of 8, not at {site.start}")
    out = torch.empty((len(directions), -(-count // 8)), dtype=torch.uint8, device=device)
    _ops.signs_(out, signed(seed), site.param_id, list(directions), site.start, count, int(stream))
    return out


def state_hash(theta: Tensor, site: Site) -> int:
    """A slice's part of the hash of the weights, 0 .. 2**64 - 1; see `zo_ds.maths.hashing.state_hash`.

    Raises:
        ValueError: theta is not contiguous fp32 / bf16 / fp16.
    """
    _check_floats(theta, "theta")
    return int(_ops.state_hash(theta, site.param_id, site.start)) & _MASK64


def _check_floats(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in _DTYPES or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else " and not contiguous"
        raise ValueError(f"{name} must be contiguous fp32, bf16 or fp16; it is {tensor.dtype}{layout}")


def _check_block(out: Tensor, shape: tuple[int, ...], source: Tensor, radii: int) -> None:
    if tuple(out.shape) != shape or not out.is_contiguous() or out.dtype not in (source.dtype, torch.float32):
        raise ValueError(f"out must be contiguous {list(shape)} in {source.dtype} or fp32")
    if out.device != source.device or radii != shape[0]:
        raise ValueError(f"out must be on {source.device}, with one eps for each of {shape[0]} directions")
