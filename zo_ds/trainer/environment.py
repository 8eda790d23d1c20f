"""Where a run runs: versions, processor, threads, memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import psutil
import torch

import zo_ds
from zo_ds.ops.builder import CPUOpBuilder, Report
from zo_ds.ops.cuda_builder import CUDAOpBuilder

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pydantic", "numpy")
GIB = 2**30


def use_threads(setting: int | Literal["auto"], local_ranks: int) -> int:
    """Set the CPU threads of this process and return their number; auto: cores divided by the node's ranks."""
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // local_ranks) if setting == "auto" else setting
    torch.set_num_threads(threads)
    return threads


def describe(world_size: int, threads: int) -> dict[str, Any]:
    """What env.json holds."""
    return {
        "zo_ds": zo_ds.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": world_size,
        "threads_per_rank": threads,
        "ops": {report.name: report.active for report in op_reports()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": sys.argv,
    }


def op_reports() -> list[Report]:
    """Which compiled ops are active, and why."""
    return [CPUOpBuilder().report(), CUDAOpBuilder().report()]


def memory_gib() -> float:
    """What this process holds now: device memory on a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def peak_rss_gib() -> float:
    """Most resident memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
