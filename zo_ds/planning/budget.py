"""Decides what stays on the device, how far ahead the rest is fetched, and predicts what a step then takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure
from zo_ds.planning.cost import HOST_SHARE, Offload, Problem, seconds_of, traffic_of
from zo_ds.planning.hardware import Hardware
from zo_ds.planning.memory import Work, activation_bytes, replicas_for, scratch_bytes
from zo_ds.planning.placement import Placement, gb
from zo_ds.planning.shapes import ModelShapes, Unit

RESERVED_SHARE = 0.03
"""Of the device: left to the allocator's fragmentation. A choice, not a measurement."""

AHEAD_MAY_COST = 0.1
"""A layer is fetched ahead, rather than a matrix, if that makes the step no longer than this: a real link stutters."""


def plan(
    shapes: ModelShapes,
    hardware: Hardware,
    *,
    num_directions: int,
    examples: int,
    tokens: int,
    dtype_bytes: int = 2,
    offload: Offload = "cpu",
    device_budget_bytes: int | None = None,
    shard_size: int = 1,
    replicas_per_pass: int | None = None,
    activation_budget_bytes: int = 2**30,
    labelled: int | None = None,
    micro_batches: int = 1,
    noise: NoiseStructure = NoiseStructure.DENSE,
) -> Placement:
    """Place a model's weights on a machine so that a step fits and takes the least time.

    Args:
        shapes: of the model.
        hardware: one rank's device, and its node.
        num_directions: N; a step evaluates N + 1 places.
        examples: of one unit of work.
        tokens: of each of them.
        dtype_bytes: of one element of a matrix: 2 or 4.
        offload: where weights that are not resident lie.
        device_budget_bytes: all that may be taken of the device, driver and libraries included; None: its memory.
        shard_size: ranks that hold one copy of the weights together.
        replicas_per_pass: places in one pass; None: as many as the budget of activations holds.
        activation_budget_bytes: see `zo_ds.forward.joining.PassSize`.
        labelled: positions of a unit of work that reach the head; None: all.
        micro_batches: units of work in a step, each of which fetches the weights anew.
        noise: dense and gaussian directions are written out as displaced copies, factored ones are not.

    Raises:
        ConfigError: something is not a size, or nothing fits.
    """
    sizes = (num_directions, examples, tokens, shard_size, replicas_per_pass or 1, micro_batches, hardware.ranks)
    if min(sizes) < 1 or dtype_bytes not in (2, 4) or hardware.ranks % shard_size:
        raise ConfigError(
            "the plan was asked for something that is no size",
            where=f"directions, examples, tokens, shard size, replicas, micro-batches, ranks = {sizes}",
            why="all must be at least 1, dtype_bytes 2 or 4, and the shard size must divide the ranks of the node",
        )
    work = Work(num_directions, examples, tokens, examples * tokens if labelled is None else labelled, dtype_bytes)
    replicas = min(replicas_per_pass or replicas_for(shapes, work, activation_budget_bytes), work.places)
    budget = hardware.device_bytes if device_budget_bytes is None else device_budget_bytes
    problem = Problem(
        shapes=shapes,
        hardware=hardware,
        work=work,
        offload=offload,
        noise=noise,
        budget=budget,
        shard_size=shard_size,
        replicas=replicas,
        micro_batches=micro_batches,
        activations=activation_bytes(shapes, work, replicas),
        scratch=scratch_bytes(shapes, work, replicas),
        reserve=hardware.context_bytes + int(RESERVED_SHARE * budget),
    )
    found = [_placement(problem, away, ahead) for away, ahead in _candidates(problem)]
    if not found:
        raise _nothing_fits(problem)
    fastest = min(placement.seconds.step for placement in found)
    ahead = max(p.prefetch_elements for p in found if p.seconds.step <= (1 + AHEAD_MAY_COST) * fastest)
    best = min((p for p in found if p.prefetch_elements == ahead), key=lambda placement: placement.seconds.step)
    _check_host(best)
    return best


def _candidates(problem: Problem) -> Iterator[tuple[list[Unit], int]]:
    """Units that are fetched, and elements ahead: nothing; or a layer, a matrix, none ahead."""
    if problem.needs([], 0) <= problem.room:
        yield [], 0
        return
    if problem.offload == "none" and problem.shard_size == 1:
        return
    layers = [unit for unit in problem.shapes.units if unit.is_block] or list(problem.shapes.units)
    layer, matrix = max(u.elements for u in layers), max(u.largest_elements for u in layers)
    for ahead in dict.fromkeys((layer, matrix, 0)):
        for away in _away(problem, ahead):
            yield away, ahead


def _away(problem: Problem, ahead: int) -> Iterator[list[Unit]]:
    """Sets of units that are fetched, each as small as fits beside the units outside of the layers that it keeps."""
    units = problem.shapes.units
    # What is fetched twice in a pass stays first.
    others = sorted((u for u in units if not u.is_block), key=lambda u: (-u.uses, u.elements))
    layers = [unit for unit in units if unit.is_block]
    for first in range(len(others), -1, -1):
        # Layers are alike: how many can stay is found by halving.
        low, high = -1, len(layers)
        while low < high:
            middle = (low + high + 1) // 2
            fits = problem.needs([*others[first:], *_spread(layers, middle)], ahead) <= problem.room
            low, high = (middle, high) if fits else (low, middle - 1)
        if low >= 0:
            gone = {*others[first:], *_spread(layers, low)}
            yield [unit for unit in units if unit in gone]


def _spread(layers: Sequence[Unit], resident: int) -> list[Unit]:
    """The layers that are fetched, if so many are resident, evenly spread: between two fetches there is time."""
    count = len(layers)
    return [layer for i, layer in enumerate(layers) if (i + 1) * resident // count == i * resident // count]


def _placement(problem: Problem, away: list[Unit], ahead: int) -> Placement:
    shapes, apart = problem.shapes, set(away)
    resident = [unit for unit in shapes.units if unit not in apart]
    size = problem.work.dtype_bytes
    largest = max((unit.elements for unit in away), default=0)
    ahead = min(ahead, largest)
    window, overshoot = largest + ahead, max((unit.largest_elements for unit in away), default=0)
    layer = max((unit.elements for unit in away if unit.is_block), default=largest)
    whole, kept = shapes.bytes(size), sum(problem.size(unit) for unit in resident)
    # Resident weights have no second copy on the host.
    outside = 0 if problem.offload == "none" else problem.copies * (whole - kept)
    device = {
        "resident": kept,
        "shards": sum(problem.shard(unit) for unit in away),
        "streamed": problem.streamed(away, ahead),
        "activations": problem.activations,
        "scratch": problem.scratch,
        "buffers": shapes.buffer_bytes,
        "reserve": problem.reserve,
    }
    traffic = traffic_of(problem, resident, away, outside)
    return Placement(
        hardware=problem.hardware,
        offload=problem.offload,
        places=problem.work.places,
        replicas_per_pass=problem.replicas,
        passes=problem.passes,
        resident_units=tuple(unit.name for unit in resident),
        resident_parameters=tuple(name for unit in resident for name in unit.parameters),
        units=len(shapes.units),
        resident_fraction=kept / max(1, whole),
        prefetch_units=round(ahead / max(1, layer), 2),
        prefetch_elements=ahead,
        window_elements=window,
        max_live_elements=max(largest, window - overshoot),
        device=device,
        budget_bytes=problem.budget,
        # From the disk through two buffers: one is read while the other is used.
        host_bytes=outside if problem.offload == "cpu" else min(outside, 2 * problem.hardware.ranks * overshoot * size),
        disk_bytes=outside if problem.offload == "nvme" else 0,
        traffic=traffic,
        seconds=seconds_of(problem, traffic, away, overlapped=ahead > 0 or not away),
    )


def _nothing_fits(problem: Problem) -> ConfigError:
    shapes, size = problem.shapes, problem.work.dtype_bytes
    parts = (
        f"activations {gb(problem.activations)}, scratch {gb(problem.scratch)}, buffers {gb(shapes.buffer_bytes)}, "
        f"reserve {gb(problem.reserve)}"
    )
    if problem.offload == "none" and problem.shard_size == 1:
        least, what = shapes.bytes(size), "the weights do"
        remedy = "offload to cpu or nvme, shard over several ranks, or take a smaller dtype"
    else:
        least = min(problem.needs(list(shapes.units), 0), problem.needs([u for u in shapes.units if u.is_block], 0))
        what = "even one layer at a time does"
        remedy = "lower replicas_per_pass, examples or tokens, or take a device with more memory"
    return ConfigError(
        f"{what} not fit the device: {gb(least)} GB of weights in {gb(max(0, problem.room))} GB",
        where=f"{problem.hardware.name}, budget {gb(problem.budget)} GB",
        why=f"needed besides the weights, in GB: {parts}",
        remedy=remedy,
    )


def _check_host(placement: Placement) -> None:
    hardware = placement.hardware
    taken = placement.host_bytes + (placement.device_bytes if hardware.shared_memory else 0)
    if taken > (1.0 if hardware.shared_memory else HOST_SHARE) * hardware.host_bytes:
        raise ConfigError(
            f"the weights do not fit the node's memory: {gb(taken)} GB of {gb(hardware.host_bytes)} GB",
            where=f"{hardware.name}, offload: {placement.offload}",
            why=f"{hardware.ranks} rank(s) hold {gb(placement.host_bytes)} GB of weights outside of their devices, and "
            f"a tenth of the node's memory stays free",
            remedy="offload to nvme, shard over the node's ranks, or start fewer ranks",
        )
