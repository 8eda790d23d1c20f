"""The planner's prediction against a measured step on this machine: seconds, and memory beyond the libraries.

    python tools/bench_plan.py [--repeats 3] [--json PATH]

Random models of OPT's shapes, fp32, N = 8, all positions labelled, weights resident. The plan knows the shapes and what
`zo_ds.planning.hardware.measure` finds in three seconds: a product's rate and a copy's.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from measure import peak_mib, show, write_json

import zo_ds
from zo_ds.models.shapes import meta_model
from zo_ds.planning.budget import plan
from zo_ds.planning.hardware import measure
from zo_ds.planning.shapes import ModelShapes
from zo_ds.stores.base import materialise
from zo_ds.trainer.environment import describe, use_threads

_CASES = {
    "opt-125m, 4 x 64": ("opt-125m", 4),
    "opt-125m, 16 x 64": ("opt-125m", 16),
    "opt-350m, 4 x 64": ("opt-350m", 4),
}
_TARGETS = {
    f"{case}: {what}": ("<=", limit)
    for case in _CASES
    for what, limit in (("memory off by", 0.1), ("time off by", 0.2))
}
_N = 8


def measured(name: str, examples: int, repeats: int) -> tuple[float, float, float]:
    """(median seconds of a step, peak bytes of such a step, of the first) beyond what was there before the model."""
    before = psutil.Process().memory_info().rss
    model = meta_model(name, torch.float32)
    materialise(model, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    engine = zo_ds.initialize(model, {"zeroth_order": {"num_directions": _N, "lr": 1e-5}})
    ids = torch.randint(5, 1000, (examples, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    seconds: list[float] = []

    def steps() -> None:
        for _ in range(repeats):
            begun = time.perf_counter()
            engine.step(batch)
            seconds.append(time.perf_counter() - begun)

    first = peak_mib(lambda: engine.step(batch)) * 2**20
    peak = peak_mib(steps) * 2**20
    return median(seconds), peak - before, first - before


def in_a_process(name: str, examples: int, repeats: int) -> tuple[float, float, float]:
    """`measured` in a process of its own, where nothing of an earlier case is left."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, name, examples, repeats).result()


def main() -> None:
    """Read arguments and print figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(json.dumps(describe(1, use_threads("auto", 1))))
    machine, found = measure(torch.float32), dict[str, Any]()
    for case, (name, examples) in _CASES.items():
        shapes = ModelShapes.of(meta_model(name, torch.float32))
        how: dict[str, Any] = {"examples": examples, "tokens": 64, "dtype_bytes": 4, "offload": "none"}
        placed = plan(shapes, machine, num_directions=_N, **how)
        seconds, memory, first = in_a_process(name, examples, args.repeats)
        wanted = placed.device_bytes - placed.device["reserve"]
        found[f"{case}: s/step measured"], found[f"{case}: s/step planned"] = seconds, placed.seconds.step
        found[f"{case}: GB measured"], found[f"{case}: GB planned"] = memory / 1e9, wanted / 1e9
        found[f"{case}: GB of the first step"] = first / 1e9
        found[f"{case}: time off by"] = abs(placed.seconds.step / seconds - 1)
        found[f"{case}: memory off by"] = abs(wanted / memory - 1)
    show(found, _TARGETS)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
