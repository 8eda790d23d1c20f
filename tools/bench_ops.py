"""Times the perturbation ops against copying the tensor, and against perturbing the way MeZO and released FZOO do.

    python tools/bench_ops.py [--device cuda] [--json PATH] [--elements N] [--repeats N]

One process, medians of interleaved repeats, one CPU thread unless said otherwise. `floor` is the time that the bytes an
op must move would take at the bandwidth of the copy: what no implementation can beat by much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_ds.maths.directions import Site
from zo_ds.maths.update import Term, Update
from zo_ds.ops import api
from zo_ds.ops.plan import Plan
from zo_ds.trainer.environment import describe, use_threads

SITE = Site(0x12345678, decays=True)
SEED = 0x0123456789ABCDEF
EPS = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {
    "perturb_over_copy_fp32": ("<=", 1.0),
    "perturb_over_copy_bf16": ("<=", 1.3),
    "update8_over_copy_fp32": ("<=", 2.0),
    "update8_over_copy_bf16": ("<=", 5.0),
    "update1_over_update64_per_direction": (">=", 6.0),
    "update8_torch_over_ours": (">=", 40.0),
    "threads2_speedup": (">=", 1.8),
}


class Bench:
    """Named functions, timed in turns so that a drifting machine hits all of them alike."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device = device
        self._repeats = repeats
        self._jobs: dict[str, tuple[Callable[[], object], int]] = {}

    def add(self, name: str, job: Callable[[], object], threads: int = 1) -> None:
        """Time a function under this name."""
        self._jobs[name] = (job, threads)

    def run(self) -> dict[str, float]:
        """Median seconds of each."""
        times: dict[str, list[float]] = {name: [] for name in self._jobs}
        for turn in range(self._repeats + 1):
            for name, (job, threads) in self._jobs.items():
                torch.set_num_threads(threads)
                self._wait()
                begin = time.perf_counter()
                job()
                self._wait()
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - begin)
        return {name: statistics.median(values) for name, values in times.items()}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def plan(directions: int) -> Plan:
    """One update of so many directions."""
    terms = tuple(Term(3, i, 1e-6 * (i + 1)) for i in range(directions))
    return Plan.of(SEED, [Update(3, terms, decay=1e-4)])


def add_ops(bench: Bench, name: str, theta: Tensor, two_threads: bool) -> None:
    """The ops and the copy on one tensor."""
    out, plans = torch.empty_like(theta), {n: plan(n) for n in (1, 8, 64)}
    block = out.unsqueeze(0)
    bench.add(f"copy {name}", lambda: out.copy_(theta))
    bench.add(f"perturb {name}", lambda: api.perturb(theta, SITE, SEED, [0], [EPS], out=block))
    for n, fixed in plans.items():
        bench.add(f"update{n} {name}", partial(api.apply_, [theta], [SITE], fixed))
    bench.add(f"hash {name}", lambda: api.state_hash(theta, SITE))
    if two_threads:
        bench.add(f"copy {name} 2 threads", lambda: out.copy_(theta), 2)
        bench.add(f"perturb {name} 2 threads", lambda: api.perturb(theta, SITE, SEED, [0], [EPS], out=block), 2)
        bench.add(f"update8 {name} 2 threads", lambda: api.apply_([theta], [SITE], plans[8]), 2)


def add_torch_updates(bench: Bench, theta: Tensor) -> None:
    """An update of 8 directions as peers do it: a seeded generator, a tensor of noise and an add for each."""

    def normal() -> None:
        for i in range(8):
            generator = torch.Generator(theta.device).manual_seed(i)
            theta.add_(torch.normal(0, 1, theta.shape, generator=generator, device=theta.device), alpha=-1e-6)

    def randint() -> None:
        for i in range(8):
            generator = torch.Generator(theta.device).manual_seed(i)
            u = torch.randint(0, 2, theta.shape, generator=generator, dtype=torch.int8, device=theta.device)
            theta.add_(u.mul_(2).sub_(1), alpha=-1e-6)

    bench.add("update8 torch.normal (MeZO)", normal)
    bench.add("update8 torch.randint (FZOO)", randint)


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """The figures that are asked for; those of two threads only where they were measured."""
    found = {
        **{f"perturb_over_copy_{d}": seconds[f"perturb {d}"] / seconds[f"copy {d}"] for d in DTYPES},
        **{f"update8_over_copy_{d}": seconds[f"update8 {d}"] / seconds[f"copy {d}"] for d in DTYPES},
        "update1_over_update64_per_direction": seconds["update1 fp32"] / (seconds["update64 fp32"] / 64),
        "update8_torch_over_ours": min(seconds["update8 torch.normal (MeZO)"], seconds["update8 torch.randint (FZOO)"])
        / seconds["update8 fp32"],
    }
    if "update8 fp32 2 threads" in seconds:
        found["threads2_speedup"] = seconds["update8 fp32"] / seconds["update8 fp32 2 threads"]
    return found


def report(seconds: Mapping[str, float], elements: int) -> str:
    """A table: time, elements a second, and the floor of bytes moved at copy bandwidth."""
    lines = [f"{'':<32}{'ms':>9}{'Gelem/s':>10}{'x copy':>9}{'floor':>8}"]
    for name, value in seconds.items():
        dtype = next((d for d in DTYPES if d in name), "fp32")
        # A copy, a perturbation and an update read and write every element once; a hash only reads.
        floor = 0.5 if name.startswith("hash") else 1.0
        copy = seconds[f"copy {dtype}"]
        lines.append(f"{name:<32}{value * 1e3:>9.2f}{elements / value / 1e9:>10.2f}{value / copy:>9.2f}{floor:>8.1f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = torch.device(options.device)
    threads = use_threads("auto", 1)
    environment = describe(1, threads)
    bench = Bench(device, options.repeats)
    values = torch.randn(options.elements, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, dtype in DTYPES.items():
        add_ops(bench, name, values.to(device, dtype), two_threads=device.type == "cpu" and threads >= 2)
    add_torch_updates(bench, values.to(device))
    seconds = bench.run()
    found = ratios(seconds)
    print(json.dumps(environment, indent=2))
    print(f"\n{options.elements} elements, medians of {options.repeats}\n{report(seconds, options.elements)}\n")
    for key, value in found.items():
        sign, wanted = TARGETS[key]
        met = value <= wanted if sign == "<=" else value >= wanted
        print(f"{key:<40}{value:>8.2f}   asked {sign} {wanted:<5}{'' if met else '  not reached'}")
    if options.json:
        tree: dict[str, Any] = {**found, "seconds": seconds, "elements": options.elements, "environment": environment}
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
