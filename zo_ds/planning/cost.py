"""What a placement costs: bytes on the device, bytes over every wire, seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from zo_ds.maths.directions import NoiseStructure
from zo_ds.planning.hardware import Hardware
from zo_ds.planning.memory import Work
from zo_ds.planning.placement import Seconds, Traffic
from zo_ds.planning.shapes import VECTOR_BYTES, ModelShapes, Unit

Offload = Literal["none", "cpu", "nvme"]
HOST_SHARE = 0.9
"""Of the node's memory that weights may take."""
UPDATE_NS, UPDATE_NS_PER_DIRECTION = 0.193, 0.0233
"""For one element on one core: docs/ops.md, bf16, 3.62 ms at N = 1 and 28.2 ms at N = 64 for 2^24 elements."""
GAUSSIAN_NS_PER_DIRECTION = 0.69
"""The same of gaussian directions: 18.0 ms at N = 1 and 99.3 ms at N = 8."""


@dataclass(frozen=True)
class Problem:
    """What `plan` was asked, with what follows from it at once; all memory in bytes."""

    shapes: ModelShapes
    hardware: Hardware
    work: Work
    offload: Offload
    noise: NoiseStructure
    budget: int
    shard_size: int
    replicas: int
    micro_batches: int
    activations: int
    scratch: int
    reserve: int

    @property
    def room(self) -> int:
        """For weights."""
        return self.budget - self.reserve - self.activations - self.scratch - self.shapes.buffer_bytes

    @property
    def copies(self) -> int:
        """Of the weights on the node."""
        return self.hardware.ranks // self.shard_size

    @property
    def passes(self) -> int:
        """Of the model in a step."""
        return -(-self.work.places // self.replicas) * self.micro_batches

    def size(self, unit: Unit) -> int:
        """Bytes of a unit's weights."""
        return unit.bytes(self.work.dtype_bytes)

    def shard(self, unit: Unit) -> int:
        """Bytes of it that are on the device even if it is not resident."""
        return -(-self.size(unit) // self.shard_size) if self.offload == "none" else 0

    def needs(self, away: Sequence[Unit], prefetch: int) -> int:
        """Bytes of weights on the device if these units are fetched, with so many elements ahead."""
        apart = set(away)
        resident = sum(self.size(unit) for unit in self.shapes.units if unit not in apart)
        return resident + sum(self.shard(unit) for unit in away) + self.streamed(away, prefetch)

    def streamed(self, away: Sequence[Unit], prefetch: int) -> int:
        """Bytes of fetched weights at one time: a unit, and what is ahead of it."""
        if not away:
            return 0
        largest = max(self.size(unit) for unit in away)
        vectors = max(unit.vector_elements for unit in away) * VECTOR_BYTES
        return largest + min(largest, prefetch * self.work.dtype_bytes + vectors) * (prefetch > 0)


def traffic_of(problem: Problem, resident: Iterable[Unit], away: Sequence[Unit], outside: int) -> Traffic:
    """Bytes of one step.

    Args:
        problem: what is planned.
        resident: units that stay on the device.
        away: units that are fetched.
        outside: bytes of weights that the node holds outside of its devices.
    """
    size, shapes = problem.work.dtype_bytes, problem.shapes
    fetched = problem.passes * sum(problem.size(unit) * unit.uses for unit in away)
    own = fetched // problem.shard_size
    on_disk = problem.offload == "nvme" and outside > HOST_SHARE * problem.hardware.host_bytes
    # Weights on disk are updated on their way in and written back, whether or not the page cache holds them.
    trained = sum(unit.trained_bytes(size) for unit in away)
    displaced = shapes.trained_layer_products + (shapes.head_products if shapes.head_is_trained else 0)
    # A copy is made of the weights (read, written) and multiplied (read).
    copied = problem.noise is not NoiseStructure.FACTORED
    perturbed = 3 * displaced * size * problem.work.num_directions * problem.micro_batches if copied else 0
    updated = 2 * sum(unit.trained_bytes(size) for unit in resident)
    return Traffic(
        link=0 if problem.offload == "none" else own,
        disk_read=problem.copies * fetched if on_disk else 0,
        disk_write=problem.copies * trained if problem.offload == "nvme" else 0,
        gathers=fetched - own,
        scalars=16 * problem.work.places + 48,
        device=perturbed + updated,
    )


def seconds_of(problem: Problem, traffic: Traffic, away: Sequence[Unit], *, overlapped: bool) -> Seconds:
    """Seconds of one step at the hardware's own rates.

    Args:
        problem: what is planned.
        traffic: from `traffic_of`.
        away: units that are fetched.
        overlapped: whether something is fetched ahead.
    """
    hardware, work, shapes = problem.hardware, problem.work, problem.shapes
    products = shapes.layer_products * work.place_tokens + shapes.head_products * work.labelled
    # All ranks of the node read the same host memory.
    link = min(hardware.link_bytes_per_s, hardware.host_bytes_per_s / hardware.ranks)
    read, write = hardware.disk_read_bytes_per_s, hardware.disk_write_bytes_per_s
    trained = sum(unit.trained_bytes(work.dtype_bytes) for unit in away)
    elements = sum(unit.trained_matrix_elements + unit.trained_vector_elements for unit in away)
    gaussian = problem.noise is NoiseStructure.GAUSSIAN
    each = GAUSSIAN_NS_PER_DIRECTION if gaussian else UPDATE_NS_PER_DIRECTION
    core = (UPDATE_NS + each * work.num_directions) * 1e-9
    update = problem.copies * max(elements * core / hardware.host_cores, 2 * trained / hardware.host_bytes_per_s)
    on_device = problem.offload == "none"
    return Seconds(
        products=2.0 * products * work.places * problem.micro_batches / hardware.flops_per_s,
        device_memory=traffic.device / hardware.device_bytes_per_s
        + (2 * trained / problem.shard_size / hardware.device_bytes_per_s if on_device else 0.0),
        link=(traffic.link + traffic.gathers) / link,
        disk=traffic.disk_read / read + traffic.disk_write / write,
        update=0.0 if on_device else update,
        overlapped=overlapped,
        update_overlapped=problem.offload == "nvme",
    )
