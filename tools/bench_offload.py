"""What offloading costs a step on this machine: the quickstart's batches with resident, offloaded and disk weights.

    python tools/bench_offload.py [--repeats 5] [--json PATH]

All stores take the same steps in turns in one process, so that a drifting machine hits them alike. Ratios are over the
resident step. On a processor nothing is moved when weights are "offloaded" to its own memory: what is left is
DeepSpeed's machinery, about a fifth of a millisecond for every call of a module that holds parameters. Disk weights are
read (from the page cache, if memory is free), checked, updated and written back once a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Bench, show, write_json

import zo_ds
from zo_ds.config.load import load_config
from zo_ds.engine.engine import ZOEngine
from zo_ds.parallel.channel import SoloChannel
from zo_ds.tasks.batch import Batch
from zo_ds.trainer.environment import describe, use_threads
from zo_ds.trainer.job import check, encode_units, load, make_sampler, settle

_TARGETS = {"cpu / resident": ("<=", 1.15)}
_BATCHES = 4


def open_engine(zero: dict[str, Any]) -> tuple[ZOEngine, list[list[Batch]]]:
    """An engine for the quickstart's model with its first batches."""
    channel = SoloChannel()
    config = load_config(Path("configs/quickstart.yaml"))
    config = config.model_copy(update={"deepspeed": {"zero_optimization": zero}})
    plan = check(config, channel)
    loaded, asking = load(plan)
    engine = zo_ds.initialize(loaded.module, config, loss_fn=asking.loss_fn, channel=channel, weights=loaded.source)
    settle(engine, asking, plan)
    sampler = make_sampler(config, plan.task, plan.splits, asking.learner)
    steps = [[plan.splits.train[index] for index in sampler.indices(step)] for step in range(_BATCHES)]
    micro = config.training.micro_batch_size
    return engine, [encode_units(examples, micro, asking.learner, engine.grid, engine.device) for examples in steps]


def main() -> None:
    """Read arguments and print figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = use_threads("auto", 1)
    print(json.dumps(describe(1, threads)))
    with tempfile.TemporaryDirectory() as folder:
        stores: dict[str, dict[str, Any]] = {
            "resident": {"stage": 0},
            "cpu": {"stage": 3, "offload_param": {"device": "cpu"}},
            "nvme": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": folder}},
        }
        bench, traffic = Bench(torch.device("cpu"), args.repeats), {}
        for name, zero in stores.items():
            engine, batches = open_engine(zero)
            engine.step(batches[0])
            traffic[name] = engine.step(batches[1]).traffic
            bench.add(name, lambda engine=engine, batches=batches: [engine.step(batch) for batch in batches])  # type: ignore[misc]  # bound now
        seconds = {name: value / _BATCHES for name, value in bench.run().items()}
    found = {f"{name}, s/step": value for name, value in seconds.items()}
    found |= {f"{name} / resident": seconds[name] / seconds["resident"] for name in ("cpu", "nvme")}
    found["nvme, GB read a step"] = traffic["nvme"].disk_read / 1e9
    found["nvme, GB written a step"] = traffic["nvme"].disk_written / 1e9
    show(found, _TARGETS)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
