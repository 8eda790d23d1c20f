"""What the benchmarks share: functions timed in turns, figures beside what was asked, the peak of memory."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Return when all that was launched has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """Named functions, timed in turns so that a drifting machine hits all of them alike.

    Args:
        device: where they run.
        repeats: times each is timed, after one turn that warms up.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device = device
        self._repeats = repeats
        self._jobs: dict[str, tuple[Callable[[], object], int | None]] = {}

    def add(self, name: str, job: Callable[[], object], threads: int | None = None) -> None:
        """Time a function under this name, with so many threads (as many as there are now if None)."""
        self._jobs[name] = (job, threads)

    def run(self) -> dict[str, float]:
        """Median seconds of each."""
        times: dict[str, list[float]] = {name: [] for name in self._jobs}
        before = torch.get_num_threads()
        for turn in range(self._repeats + 1):
            for name, (job, threads) in self._jobs.items():
                torch.set_num_threads(threads or before)
                wait(self._device)
                begin = time.perf_counter()
                job()
                wait(self._device)
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - begin)
        torch.set_num_threads(before)
        return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(job: Callable[[], object]) -> float:
    """Most memory that the process held while a function ran, in MiB (resident on Linux, allocated on CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    job()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def show(found: Mapping[str, float], targets: Mapping[str, tuple[str, float]]) -> None:
    """Print figures, each beside what was asked of it."""
    for key, value in found.items():
        if key not in targets:
            print(f"{key:<40}{value:>9.3f}")
            continue
        sign, wanted = targets[key]
        met = value <= wanted if sign == "<=" else value >= wanted
        print(f"{key:<40}{value:>9.3f}   asked {sign} {wanted:<5}{'' if met else '  not reached'}")


def write_json(path: Path | None, tree: Mapping[str, Any]) -> None:
    """Write a tree of figures, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
