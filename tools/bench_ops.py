"""Times the perturbation ops against copying the tensor, and against perturbing the way MeZO and released FZOO do.

    python tools/bench_ops.py [--device cuda] [--json PATH] [--elements N] [--repeats N]

One process, medians of interleaved repeats, one CPU thread unless said otherwise. `floor` is the time that the bytes an
op must move would take at the bandwidth of the copy: what no implementation can beat by much.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measure import Bench, show, write_json
from torch import Tensor

from zo_ds.maths.directions import Site
from zo_ds.maths.update import Term, Update
from zo_ds.ops import api
from zo_ds.ops.plan import Plan
from zo_ds.trainer.environment import describe, use_threads

SITE = Site(0x12345678, decays=True)
GAUSSIAN = replace(SITE, gaussian=True)
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


def plan(directions: int) -> Plan:
    """One update of so many directions."""
    terms = tuple(Term(3, i, 1e-6 * (i + 1)) for i in range(directions))
    return Plan.of(SEED, [Update(3, terms, decay=1e-4)])


def add_ops(bench: Bench, name: str, theta: Tensor, two_threads: bool) -> None:
    """The ops and the copy on one tensor."""
    out, plans = torch.empty_like(theta), {n: plan(n) for n in (1, 8, 64)}
    block = out.unsqueeze(0)
    bench.add(f"copy {name}", lambda: out.copy_(theta), 1)
    bench.add(f"perturb {name}", lambda: api.perturb(theta, SITE, SEED, [0], [EPS], out=block), 1)
    for n, fixed in plans.items():
        bench.add(f"update{n} {name}", partial(api.apply_, [theta], [SITE], fixed), 1)
    bench.add(f"gaussian perturb {name}", lambda: api.perturb(theta, GAUSSIAN, SEED, [0], [EPS], out=block), 1)
    for n in (1, 8):
        bench.add(f"gaussian update{n} {name}", partial(api.apply_, [theta], [GAUSSIAN], plans[n]), 1)
    bench.add(f"hash {name}", lambda: api.state_hash(theta, SITE), 1)
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

    bench.add("update8 torch.normal (MeZO)", normal, 1)
    bench.add("update8 torch.randint (FZOO)", randint, 1)


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
    show(found, TARGETS)
    write_json(options.json, {**found, "seconds": seconds, "elements": options.elements, "environment": environment})


if __name__ == "__main__":
    main()
