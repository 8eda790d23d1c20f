"""What a machine offers: presets from data sheets, single values overridden, or what is measured here."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import torch

from zo_ds.errors import ConfigError
from zo_ds.forward.products import linear


@dataclass(frozen=True)
class Hardware:
    """One device and the node around it. All rates are those of one direction.

    Attributes:
        name: for tables.
        device_bytes: memory of the device.
        device_bytes_per_s: of that memory.
        flops_per_s: dense matrix products in the dtype of the weights.
        link_bytes_per_s: from host memory to one device; also taken for gathers between the node's ranks.
        host_bytes: memory of the node.
        host_bytes_per_s: of that memory, over all ranks.
        disk_read_bytes_per_s, disk_write_bytes_per_s: of the node's disk.
        ranks: processes with a device each on this node.
        host_cores: which update the weights in host memory.
        context_bytes: of the device, taken by driver and libraries: planned for, not measured.
        shared_memory: the device is the processor: both memories are one.
    """

    name: str
    device_bytes: int
    device_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    host_bytes: int
    host_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    ranks: int = 1
    host_cores: int = 1
    context_bytes: int = 0
    shared_memory: bool = False

    def overridden(self, pairs: Sequence[str]) -> Hardware:
        """With single values replaced.

        Args:
            pairs: ``key=value``, keys as the attributes, numbers as ``64e9``.

        Raises:
            ConfigError: an unknown key, or something that is not a positive number.
        """
        known = {field.name for field in fields(self) if field.name not in ("name", "shared_memory")}
        changes: dict[str, Any] = {}
        for pair in pairs:
            key, sign, text = pair.partition("=")
            if not sign or key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise ConfigError(
                    f"'{key}' is no property of a machine",
                    where=pair,
                    why=f"known are {', '.join(sorted(known))}",
                    remedy=f"did you mean {near[0]}={text or 'NUMBER'}?" if near else "write key=number",
                )
            changes[key] = _number(key, text, pair, getattr(self, key))
        return replace(self, **changes)


def _number(key: str, text: str, pair: str, now: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (value == 0 and key != "context_bytes"):
        raise ConfigError(f"'{text}' is not a positive number", where=pair, remedy="write it as 24e9 or 64000000000")
    return int(value) if isinstance(now, int) else value


# The node that every card below stands in. AMD EPYC 9354 product page: 32 cores, 12 channels of DDR5-4800,
# 460.8 GB/s. Samsung PM9A3 (U.2) as announced: up to 6,500 MB/s read, 3,500 MB/s write (heise.de/-4720224). 512 GB
# of memory are a choice (say host_bytes=...), as are the 600 MB that a CUDA context and its libraries are given.
_NODE: dict[str, Any] = {
    "host_bytes": 512 * 10**9,
    "host_bytes_per_s": 460.8e9,
    "host_cores": 32,
    "disk_read_bytes_per_s": 6.5e9,
    "disk_write_bytes_per_s": 3.5e9,
    "context_bytes": 600 * 10**6,
}
_GB = 10**9
PRESETS: dict[str, Hardware] = {
    # NVIDIA H100 SXM data sheet: 80 GB, 3.35 TB/s, 1,979 TFLOPS bf16 with sparsity, half of that without;
    # PCIe Gen5 128 GB/s both ways together.
    "h100-80gb": Hardware("H100 SXM 80 GB", 80 * _GB, 3.35e12, 989.5e12, 64e9, **_NODE),
    # NVIDIA A100 80GB data sheet (SXM): 2,039 GB/s, 312 TFLOPS bf16 dense; PCIe Gen4 64 GB/s both ways.
    "a100-80gb": Hardware("A100 SXM 80 GB", 80 * _GB, 2.039e12, 312e12, 32e9, **_NODE),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362.05 TFLOPS bf16 dense; PCIe Gen4 x16 64 GB/s both ways.
    "l40s-48gb": Hardware("L40S 48 GB", 48 * _GB, 864e9, 362.05e12, 32e9, **_NODE),
    # NVIDIA RTX A6000 data sheet: 48 GB, 768 GB/s, 309.7 TFLOPS tensor with sparsity, half of that without; Gen4 x16.
    "a6000-48gb": Hardware("RTX A6000 48 GB", 48 * _GB, 768e9, 154.8e12, 32e9, **_NODE),
    # NVIDIA Ada GPU architecture whitepaper, RTX 4090: 24 GB, 1,008 GB/s, 165.2 TFLOPS bf16 dense, fp32 accumulation.
    "rtx4090-24gb": Hardware("RTX 4090 24 GB", 24 * _GB, 1.008e12, 165.2e12, 32e9, **_NODE),
    # NVIDIA RTX 3060 product page: 12 GB, 192 bits at 15 Gbps = 360 GB/s, 102 tensor TFLOPS with sparsity; a quarter
    # of that is dense with fp32 accumulation (as the GA102 whitepaper has it for this generation). Gen4 x16.
    "rtx3060-12gb": Hardware("RTX 3060 12 GB", 12 * _GB, 360e9, 25.5e12, 32e9, **_NODE),
    # Measured on 2 cores of an AMD EPYC with AVX-512, fp32, on a machine that others used too: the best of three calls
    # of `measure()`, when its product was still torch's own (MKL). oneDNN's, which it takes now, is faster unshared.
    # Its memory is what was available; the disk: dd of 512 MiB, O_DIRECT reads 1.1 and 1.2 GB/s, writes
    # with fsync 0.33 and 1.7 GB/s; the lower ones are taken.
    "cpu-2core": Hardware(
        "2 CPU cores",
        24 * _GB,
        28.9e9,
        171e9,
        14.45e9,
        24 * _GB,
        28.9e9,
        1.1e9,
        0.33e9,
        host_cores=2,
        shared_memory=True,
    ),
}
ALIASES = {"80gb": "h100-80gb", "48gb": "a6000-48gb", "24gb": "rtx4090-24gb", "12gb": "rtx3060-12gb"}


def preset(name: str) -> Hardware:
    """A card by its name in `PRESETS` or its memory (``24gb``), or this machine (``here``).

    Raises:
        ConfigError: nobody knows the name.
    """
    key = name.lower()
    if key == "here":
        return measure()
    key = ALIASES.get(key, key)
    if key not in PRESETS:
        raise ConfigError(
            f"there is no preset '{name}'",
            where="card",
            why=f"known are {', '.join([*PRESETS, *ALIASES, 'here'])}",
            remedy="take the nearest one and override it: device_bytes=16e9 link_bytes_per_s=12e9",
        )
    return PRESETS[key]


def measure(dtype: torch.dtype = torch.bfloat16) -> Hardware:
    """What this machine offers now, in less than 3 s. The disk is not measured: the figures of the presets stand in.

    Args:
        dtype: of the matrix products; fp32 is taken on a processor.
    """
    host = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    copies = _copy_rate(torch.device("cpu"), 2**26)
    disk = {key: _NODE[key] for key in ("disk_read_bytes_per_s", "disk_write_bytes_per_s")}
    common: dict[str, Any] = {"host_bytes": host.available, "host_bytes_per_s": copies, "host_cores": cores, **disk}
    if not torch.cuda.is_available():
        flops = _product_rate(torch.device("cpu"), torch.float32, 1024)
        # A "fetch" is a copy within memory: it reads and writes.
        return Hardware(
            f"this machine ({cores} cores)", host.available, copies, flops, copies / 2, shared_memory=True, **common
        )
    device = torch.device("cuda", torch.cuda.current_device())
    flops, memory = _product_rate(device, dtype, 8192), _copy_rate(device, 2**28)
    free, total = torch.cuda.mem_get_info(device)
    link = _link_rate(device, 2**28)
    name = torch.cuda.get_device_name(device)
    # What is taken now is the context, and whatever else runs there.
    return Hardware(name, total, memory, flops, link, context_bytes=total - free, **common)


def _best_of(job: Callable[[], object], device: torch.device, repeats: int = 4) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _copy_rate(device: torch.device, count: int) -> float:
    """Bytes read and written a second while a tensor is copied."""
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _best_of(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product, as the forward computes it."""
    x = torch.ones(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / _best_of(lambda: linear(x, x), device)


def _link_rate(device: torch.device, count: int) -> float:
    """Bytes a second from pinned host memory."""
    source = torch.empty(count, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(count, dtype=torch.uint8, device=device)
    return count / _best_of(lambda: target.copy_(source, non_blocking=True), device)
