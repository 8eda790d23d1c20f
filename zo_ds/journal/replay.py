"""Base weights + journal -> the weights of the run at any step, bit for bit; needs neither data nor a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from zo_ds.errors import CorruptRunError
from zo_ds.journal.journal import Contents
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import weights_sha256


def replay_(
    tensors: Mapping[str, Tensor],
    journal: Contents,
    steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> str:
    """Apply a journal to base weights in place, one parameter after the other.

    Args:
        tensors: whole base parameters by name, contiguous; must hold all that the journal's manifest names.
        journal: as read.
        steps: how many steps to apply; None for all.
        progress: called with the name of each finished parameter.

    Returns:
        SHA-256 of the resulting weights, comparable to `result.json`.

    Raises:
        CorruptRunError: the base weights are not those that the run started from.
        ValueError: the journal has fewer steps.
    """
    header, records = journal.header, journal.records
    if steps is not None and not 0 <= steps <= len(records):
        raise ValueError(f"the journal has {len(records)} steps, asked for {steps}")
    _check_base(tensors, journal)
    plan = Plan.of(header.run_seed, [record.update for record in records[:steps] if record.skip is None])
    for info in header.parameters:
        ops.apply_([tensors[info.name]], [info.site(header.noise)], plan)
        if progress is not None:
            progress(info.name)
    return weights_sha256((info.name, tensors[info.name]) for info in header.parameters)


def _check_base(tensors: Mapping[str, Tensor], journal: Contents) -> None:
    problems: Sequence[str] = [
        f"'{info.name}' {'is missing' if info.name not in tensors else f'is {tuple(tensors[info.name].shape)}'}"
        for info in journal.header.parameters
        if info.name not in tensors
        or tuple(tensors[info.name].shape) != info.shape
        or tensors[info.name].dtype != info.dtype
    ]
    if not problems:
        found = weights_sha256((info.name, tensors[info.name]) for info in journal.header.parameters)
        if found == journal.header.base_sha256:
            return
        problems = [f"SHA-256 {found[:16]}..., the journal wants {journal.header.base_sha256[:16]}..."]
    raise CorruptRunError(
        "these are not the weights the run started from",
        where="base model",
        why="; ".join(problems[:3]),
        remedy="use the same base model, dtype and revision as the run (see resolved.yaml)",
    )
