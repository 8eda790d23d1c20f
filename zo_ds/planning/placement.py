"""A plan: where weights lie, what crosses which wire, what that takes, and the table that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zo_ds.planning.hardware import Hardware

GB = 10**9
SMALL = 100_000
"""Elements of a parameter that stays on the device in any case; the reserve has room for those."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step, for one rank.

    Attributes:
        link: weights from host memory (or disk) to the device.
        disk_read, disk_write: of weights on disk, 0 while the page cache holds them all.
        gathers: weights from the other ranks of the shard group.
        scalars: between replicas, all that a step needs: 16 (N + 1) + 48.
        device: of device memory, for displaced copies and the update of resident weights.
    """

    link: int
    disk_read: int
    disk_write: int
    gathers: int
    scalars: int
    device: int


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of one step, each as if nothing else ran; from the hardware's own peak rates.

    Attributes:
        products: matrix products.
        device_memory: displaced copies and the update on the device, which products wait for.
        link: to the device, gathers included.
        disk: reads and writes.
        update: of weights outside of the device.
        overlapped: whether fetches run while products do.
        update_overlapped: whether the update does: weights on disk get it on their way in, those in memory afterwards.
    """

    products: float
    device_memory: float
    link: float
    disk: float
    update: float
    overlapped: bool
    update_overlapped: bool

    @property
    def device(self) -> float:
        """What the device itself is busy with."""
        return self.products + self.device_memory

    @property
    def step(self) -> float:
        """The whole step: the longest of device, link and disk (their sum without prefetching), then the update."""
        within = self.update if self.update_overlapped else 0.0
        parts = (self.device, self.link, self.disk, within)
        return (max(parts) if self.overlapped else sum(parts)) + self.update - within

    @property
    def bound(self) -> str:
        """What the step would gain most from: compute, device memory, link, disk or host update."""
        device = "compute" if self.products >= self.device_memory else "device memory"
        parts = {device: self.device, "link": self.link, "disk": self.disk, "host update": self.update}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Placement:
    """Where everything lies in a step; made by `zo_ds.planning.budget.plan`.

    Attributes:
        hardware: on which machine.
        offload: where weights are that do not stay on the device: none (on it, as shards), cpu or nvme.
        places: N + 1.
        replicas_per_pass: places in one pass.
        passes: of the model in a step; each fetches what is not resident.
        resident_units: names of units that stay on the device, whole.
        resident_parameters: names of their parameters.
        units: how many there are.
        resident_fraction: of all bytes of weights.
        prefetch_units: units fetched ahead; below 1 if only a matrix is.
        prefetch_elements: elements fetched ahead.
        window_elements: most elements of fetched weights at one time, those ahead included.
        max_live_elements: what DeepSpeed is told of that; it overshoots by one parameter.
        device: bytes on the device by part: resident, shards, streamed, activations, scratch, buffers, reserve.
        budget_bytes: what they must fit in.
        host_bytes: of weights in the node's memory, over all ranks.
        disk_bytes: of weights on disk, over all ranks.
        traffic, seconds: of one step.
    """

    hardware: Hardware
    offload: str
    places: int
    replicas_per_pass: int
    passes: int
    resident_units: tuple[str, ...]
    resident_parameters: tuple[str, ...]
    units: int
    resident_fraction: float
    prefetch_units: float
    prefetch_elements: int
    window_elements: int
    max_live_elements: int
    device: Mapping[str, int]
    budget_bytes: int
    host_bytes: int
    disk_bytes: int
    traffic: Traffic
    seconds: Seconds

    @property
    def device_bytes(self) -> int:
        """All that is planned on the device, the reserve included."""
        return sum(self.device.values())

    def settings(self) -> dict[str, int]:
        """Keys of DeepSpeed's ``zero_optimization``, counted in elements."""
        return {
            "stage3_prefetch_bucket_size": self.prefetch_elements,
            "stage3_max_live_parameters": self.max_live_elements,
            "stage3_max_reuse_distance": 0,
            # Vectors: less than a thousandth of a model, but most of the transfers.
            "stage3_param_persistence_threshold": SMALL,
        }

    def tree(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            **asdict(self),
            "device": dict(self.device),
            "device_bytes": self.device_bytes,
            "seconds": {**asdict(self.seconds), "step": self.seconds.step, "bound": self.seconds.bound},
            "settings": self.settings(),
        }

    def table(self) -> str:
        """The plan as printed: what lies where in GB (10^9 bytes), what a step takes in seconds, and what bounds it."""
        rows = [("on the device", f"{gb(self.device_bytes)} of {gb(self.budget_bytes)} GB", self.hardware.name)]
        rows += [(f"  {part}", f"{gb(count)} GB", self._note(part)) for part, count in self.device.items() if count]
        rows += [("in host memory", f"{gb(self.host_bytes)} GB", f"of {gb(self.hardware.host_bytes)} GB")]
        if self.disk_bytes:
            cached = "cached in host memory" if self.traffic.disk_read == 0 else "more than host memory caches"
            rows += [("on disk", f"{gb(self.disk_bytes)} GB", cached)]
        rows += self._traffic_rows() + self._time_rows()
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)

    def _note(self, part: str) -> str:
        live = f"{self.window_elements / 1e6:,.1f} M elements"
        layers = f"{self.prefetch_units:g} layer{'s' if self.prefetch_units > 1 else ''}"
        ahead = f"{self.prefetch_elements / 1e6:,.1f} M" if self.prefetch_units < 1 else layers
        return {
            "resident": f"{len(self.resident_units)} of {self.units} units, {self.resident_fraction:.0%} of weights",
            "streamed": f"{live}, {ahead} ahead",
            "activations": f"{self.replicas_per_pass} of {self.places} places a pass",
            "scratch": "displaced copies; the first step's check included",
            "reserve": "driver, libraries, fragmentation: planned, not measured",
        }.get(part, "")

    def _traffic_rows(self) -> list[tuple[str, str, str]]:
        t = self.traffic
        passes = f"{self.passes} pass{'es' if self.passes > 1 else ''} a step"
        rows = [("host to device a step", f"{gb(t.link)} GB", passes)]
        if self.offload == "nvme":
            rows += [("disk a step", f"{gb(t.disk_read + t.disk_write)} GB", f"{gb(t.disk_write)} GB of it written")]
        if t.gathers:
            rows += [("gathered from ranks a step", f"{gb(t.gathers)} GB", "within the shard group")]
        return [*rows, ("between replicas a step", f"{t.scalars} bytes", "scalars")]

    def _time_rows(self) -> list[tuple[str, str, str]]:
        s, memory = self.seconds, gb(self.traffic.device)
        after = s.update > 0 and not s.update_overlapped
        together = (
            "longest of device, link, disk" if s.overlapped else "sum of device, link, disk: nothing is prefetched"
        )
        return [
            ("step", f"{s.step:.3f} s", f"bound by {s.bound}; {together}" + ("; then the update" if after else "")),
            ("  compute", f"{s.products:.3f} s", "at the peak rate"),
            (
                "  device memory",
                f"{s.device_memory:.3f} s",
                f"{memory} GB of displaced copies and updates",
            ),
            ("  link", f"{s.link:.3f} s", ""),
            ("  disk", f"{s.disk:.3f} s", ""),
            ("  host update", f"{s.update:.3f} s", ""),
        ]


def gb(count: float) -> str:
    """Bytes in GB, two decimals."""
    return f"{count / GB:,.2f}"
