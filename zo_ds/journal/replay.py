"""Base weights + journal -> the weights of the run at any step, bit for bit; needs neither data nor a schedule.

One pass over the weights, however many steps: each parameter takes all updates while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from zo_ds.errors import ConfigError, CorruptRunError
from zo_ds.journal.history import History, Stretch
from zo_ds.maths.directions import NoiseStructure
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import weights_sha256

_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Leg:
    """Updates that are applied in one go.

    Attributes:
        noise: structure of their directions.
        plan: the updates in order, skipped steps left out.
        hash_step: None, or the step whose starting weights these are, to be hashed first.
    """

    noise: NoiseStructure
    plan: Plan
    hash_step: int | None


@dataclass(frozen=True)
class Replayed:
    """What a replay gave.

    Attributes:
        weights_sha256: of the resulting weights, comparable to `result.json`.
        hashes: state hash of the weights before each step that was asked for.
    """

    weights_sha256: str
    hashes: dict[int, int]


def legs(stretches: Sequence[Stretch], hash_at: Collection[int] = ()) -> Iterator[Leg]:
    """Cut a history where its noise changes and where the weights are to be hashed."""
    for stretch in (stretch for stretch in stretches if stretch.records):
        cuts = [n for n, record in enumerate(stretch.records) if n == 0 or record.step in hash_at]
        for start, stop in zip(cuts, [*cuts[1:], len(stretch.records)], strict=True):
            records = stretch.records[start:stop]
            plan = Plan.of(stretch.header.run_seed, [record.update for record in records if record.skip is None])
            yield Leg(stretch.header.noise, plan, records[0].step if records[0].step in hash_at else None)


def replay_(
    tensors: Mapping[str, Tensor],
    history: History,
    steps: int | None = None,
    *,
    first: int = 0,
    hash_at: Collection[int] = (),
    progress: Callable[[str], None] | None = None,
) -> Replayed:
    """Apply a journal to weights in place, one parameter after the other.

    Args:
        tensors: whole parameters by name, contiguous; must hold all that the journal's manifest names.
        history: the journal.
        steps: how many steps of the run the weights shall have seen; None for all.
        first: how many they have seen: 0 for base weights, which are then checked, or a snapshot's step.
        hash_at: steps before which the weights are hashed; the one after the last counts too.
        progress: called with the name of each finished parameter.

    Raises:
        CorruptRunError: the base weights are not those that the run started from, or the journal is damaged.
        ConfigError: the journal has fewer steps.
    """
    header = history.header
    end = history.end_of(first) or 0
    steps = end if steps is None else steps
    if not first <= steps <= history.segments[-1].end_step:
        raise ConfigError(f"the journal has {end} steps, not {steps}", where=str(history.path))
    plan = list(legs(history.stretches(first, steps), hash_at))
    if first == 0:
        check_base(tensors, history)
    hashes = dict.fromkeys((leg.hash_step for leg in plan if leg.hash_step is not None), 0)
    for info in header.parameters:
        tensor = tensors[info.name]
        for leg in plan:
            if leg.hash_step is not None:
                hashes[leg.hash_step] += ops.state_hash(tensor, info.site(leg.noise))
            ops.apply_([tensor], [info.site(leg.noise)], leg.plan)
        if steps in hash_at:
            hashes[steps] = hashes.get(steps, 0) + ops.state_hash(tensor, info.site(header.noise))
        if progress is not None:
            progress(info.name)
    digest = weights_sha256((info.name, tensors[info.name]) for info in header.parameters)
    return Replayed(digest, {step: value & _MASK64 for step, value in hashes.items()})


def check_base(tensors: Mapping[str, Tensor], history: History) -> None:
    """Refuse weights that are not those the run started from.

    Raises:
        CorruptRunError: names, shapes, dtypes or bytes differ.
    """
    problems: Sequence[str] = [
        f"'{info.name}' {'is missing' if info.name not in tensors else f'is {_kind(tensors[info.name])}'}"
        for info in history.header.parameters
        if info.name not in tensors
        or tuple(tensors[info.name].shape) != info.shape
        or tensors[info.name].dtype != info.dtype
    ]
    if not problems:
        found = weights_sha256((info.name, tensors[info.name]) for info in history.header.parameters)
        if found == history.header.base_sha256:
            return
        problems = [f"SHA-256 {found[:16]}..., the journal wants {history.header.base_sha256[:16]}..."]
    raise CorruptRunError(
        "these are not the weights the run started from",
        where="base model",
        why="; ".join(problems[:3]),
        remedy="use the same base model, dtype and revision as the run (see resolved.yaml)",
    )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
