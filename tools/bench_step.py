"""Times a training step of a recipe and splits it into forward, perturbation and update.

    python tools/bench_step.py [--config configs/quickstart.yaml] [--steps N] [--json PATH] [key=value ...]

Medians over steps, in one process. ZO_DS_OPS=reference gives the figures without compiled ops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zo_ds.config.load import load_config
from zo_ds.engine.initialize import initialize
from zo_ds.ops import api
from zo_ds.parallel.channel import SoloChannel
from zo_ds.trainer.environment import describe, use_threads
from zo_ds.trainer.job import check, encode_units, load, make_sampler

PARTS = {"perturb": "perturbation", "embedding_rows": "perturbation", "apply_": "update"}


def now() -> float:
    """Seconds, when all that was launched has been done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The function, with its time added to a part."""

    def call(*args: Any, **options: Any) -> Any:
        begin = now()
        try:
            return function(*args, **options)
        finally:
            spent[part] += now() - begin

    return call


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    threads = use_threads("auto", 1)
    config, channel = load_config(options.config, options.overrides), SoloChannel()
    plan = check(config, channel)
    loaded, scorer = load(plan)
    sampler = make_sampler(config, plan.splits, scorer)
    engine = initialize(loaded.module, config, loss_fn=scorer.loss, channel=channel)
    spent: dict[str, float] = defaultdict(float)
    for name, part in PARTS.items():
        setattr(api, name, timed(getattr(api, name), part, spent))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, float]] = []
    for step in range(options.steps + 1):
        examples = [plan.splits.train[i] for i in sampler.indices(step)]
        units = encode_units(examples, config.training.micro_batch_size or len(examples), scorer, channel, device)
        spent.clear()
        begin = now()
        engine.step(units)
        whole = now() - begin
        if step:
            rows.append({"step": whole, **{part: spent[part] for part in set(PARTS.values())}})
    medians = {key: statistics.median(row[key] for row in rows) for key in sorted(rows[0])}
    shares = [(row["perturbation"] + row["update"]) / row["step"] for row in rows]
    found = {**medians, "non_forward_share": statistics.median(shares)}
    environment = describe(1, threads)
    print(json.dumps(environment, indent=2))
    for key, value in found.items():
        print(f"{key:<20}{value:>10.4f}{'' if key.endswith('share') else ' s'}")
    if options.json:
        options.json.write_text(json.dumps({**found, "environment": environment}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
