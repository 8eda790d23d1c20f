"""Prints where a model's weights would lie on a card, and what a step would take; proves that its allocations fit.

    python tools/plan.py --model opt-66b --card 24gb [--offload cpu] [--directions 8] [--examples 4 --tokens 64]
        [--ranks 1] [device_bytes=16e9 link_bytes_per_s=12e9 ...] [--prove] [--json PATH]
    python tools/plan.py --all        OPT-13B, 30B, 66B, 175B on cards of 80, 48, 24 and 12 GB

Nothing is downloaded and nothing is allocated: models are built on the meta device. Seconds follow from the hardware's
peak rates: they say what bounds a step, and no step is faster. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import write_json
from prove import Proof, prove

from zo_ds.errors import ConfigError, ZODSError
from zo_ds.maths.directions import NoiseStructure
from zo_ds.models.shapes import KNOWN, meta_model
from zo_ds.planning.budget import plan
from zo_ds.planning.hardware import ALIASES, Hardware, preset
from zo_ds.planning.placement import GB, Placement, gb
from zo_ds.planning.shapes import ModelShapes
from zo_ds.trainer.environment import describe

MODELS, CARDS = ("opt-13b", "opt-30b", "opt-66b", "opt-175b"), tuple(ALIASES)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_COLUMNS = ("model", "card", "resident", "ahead", "device GB", "host GB", "link GB")
_TIMES = ("compute", "memory", "link", "disk", "update", "step s", "bound by")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-66b", help=f"{', '.join(KNOWN)}, or a folder with a config.json")
    parser.add_argument("--card", default="24gb", help="80gb, 48gb, 24gb, 12gb, a preset's name, or 'here'")
    parser.add_argument("--offload", choices=("none", "cpu", "nvme"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--noise", choices=[kind.value for kind in NoiseStructure], default="dense")
    parser.add_argument("--directions", type=int, default=8, help="N")
    parser.add_argument("--examples", type=int, default=4, help="of one unit of work")
    parser.add_argument("--tokens", type=int, default=64, help="of each example")
    parser.add_argument(
        "--labelled", type=int, help="positions of a unit of work that reach the head; all if not given"
    )
    parser.add_argument("--micro-batches", type=int, default=1, help="units of work a step")
    parser.add_argument("--replicas", type=int, help="places in one pass; by the budget of activations if not given")
    parser.add_argument("--activation-budget-mib", type=int, default=1024)
    parser.add_argument("--budget-gb", type=float, help="of the device; all of it if not given")
    parser.add_argument("--ranks", type=int, help="on the node")
    parser.add_argument("--shard-size", type=int, default=1, help="ranks that hold one copy of the weights")
    parser.add_argument("--all", action="store_true", help="the grid")
    parser.add_argument("--prove", action="store_true", help="run steps on the meta device and count allocations")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="properties of the hardware")
    return parser.parse_args(arguments)


def place(options: argparse.Namespace, shapes: ModelShapes, card: str) -> Placement:
    """The plan that the options ask for."""
    ranks = [] if options.ranks is None else [f"ranks={options.ranks}"]
    hardware: Hardware = preset(card).overridden([*options.overrides, *ranks])
    return plan(
        shapes,
        hardware,
        num_directions=options.directions,
        examples=options.examples,
        tokens=options.tokens,
        dtype_bytes=DTYPES[options.dtype].itemsize,
        offload=options.offload,
        device_budget_bytes=None if options.budget_gb is None else int(options.budget_gb * GB),
        shard_size=options.shard_size,
        replicas_per_pass=options.replicas,
        activation_budget_bytes=options.activation_budget_mib * 2**20,
        labelled=options.labelled,
        micro_batches=options.micro_batches,
        noise=NoiseStructure(options.noise),
    )


def one(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Print one plan, and its proof if that was asked for; the figures, and whether all fits."""
    model = meta_model(options.model, DTYPES[options.dtype])
    shapes = ModelShapes.of(model)
    placement = place(options, shapes, options.card)
    weights = shapes.bytes(DTYPES[options.dtype].itemsize)
    print(f"{options.model}: {shapes.elements / 1e9:.2f} B parameters, {gb(weights)} GB")
    print(placement.table())
    print("deepspeed: " + ", ".join(f"{key}={value}" for key, value in placement.settings().items()))
    if not options.prove:
        return {"placement": placement.tree()}, True
    begin = time.perf_counter()
    proof = prove(
        model,
        placement,
        examples=options.examples,
        tokens=options.tokens,
        dtype=DTYPES[options.dtype],
        labelled=options.labelled,
        noise=NoiseStructure(options.noise),
    )
    fits = show_proof(placement, proof, time.perf_counter() - begin)
    return {"placement": placement.tree(), "proof": {**asdict(proof), "fits": fits}}, fits


def show_proof(placement: Placement, proof: Proof, seconds: float) -> bool:
    """Print what a proof found beside what was planned, and return whether it fits."""
    device = placement.device
    # The planner's scratch also covers the activations of the first step's check.
    planned = {
        "weights": device["resident"] + device["shards"] + device["streamed"] + device["buffers"],
        "activations and scratch": device["activations"] + device["scratch"],
    }
    found = {"weights": proof.parts.get("weights", 0)}
    found["activations and scratch"] = proof.peak - found["weights"]
    print(f"\nproof: {proof.steps} steps on the meta device in {seconds:.1f} s; GB at the peak, planned and found")
    for part, count in planned.items():
        print(f"  {part:<24}{gb(count):>8}{gb(found[part]):>8}")
    total = sum(planned.values())
    print(f"  {'all':<24}{gb(total):>8}{gb(proof.peak):>8}   steps after the first: {gb(proof.steady)}")
    print(f"  largest allocation: {gb(proof.largest)} GB, {proof.largest_is}")
    fits = proof.peak <= total and placement.device_bytes <= placement.budget_bytes
    room = placement.budget_bytes - device["reserve"]
    verdict = "fits the plan" if fits else "DOES NOT FIT the plan"
    print(f"  {verdict}; {gb(room - proof.peak)} GB of {gb(room)} GB (the budget without its reserve) are left")
    return fits


def grid(options: argparse.Namespace) -> dict[str, Any]:
    """Print the grid; the figures by model and card."""
    rows: list[tuple[str, ...]] = [(*_COLUMNS, *_TIMES)]
    found: dict[str, Any] = {}
    for name in MODELS:
        shapes = ModelShapes.of(meta_model(name))
        for card in CARDS:
            try:
                placement = place(options, shapes, card)
            except ConfigError as error:
                rows.append((name, card, error.what, *[""] * (len(rows[0]) - 3)))
                continue
            rows.append((name, card, *_row(placement)))
            found[f"{name} {card}"] = placement.tree()
    # A message may run over the columns behind it.
    widths = [max(len(row[i]) for row in rows if row[-1]) for i in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        if row[-1]:
            cells[2:-1] = [f"{cell:>{width}}" for cell, width in zip(row[2:-1], widths[2:-1], strict=True)]
        print("  ".join(cells).rstrip())
    return {"grid": found}


def _row(placement: Placement) -> tuple[str, ...]:
    s = placement.seconds
    ahead = "-" if placement.resident_fraction == 1 else f"{placement.prefetch_elements / 1e6:.0f}M"
    sizes = (placement.device_bytes, placement.host_bytes, placement.traffic.link)
    times = (s.products, s.device_memory, s.link, s.disk, s.update, s.step)
    return (f"{placement.resident_fraction:.0%}", ahead, *map(gb, sizes), *(f"{t:.2f}" for t in times), s.bound)


def main() -> None:
    """Plan, print, and write the JSON."""
    options = parse()
    try:
        found, fits = (grid(options), True) if options.all else one(options)
    except ZODSError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(error.exit_code)
    if options.json is not None:
        write_json(options.json, {**found, "environment": describe(1, torch.get_num_threads())})
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
