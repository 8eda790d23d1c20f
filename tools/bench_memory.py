"""Host memory of an offloaded run: loading and two steps of a large random model, against the bytes of its weights.

    python tools/bench_memory.py [--billions 1.3] [--dtype float32] [--keep FOLDER] [--json PATH]

Every case is a process of its own: weights in host memory, on disk, and on disk with less memory than the model has (a
memory cgroup of version 1 or 2, which root can make; left out where there is none). The peak is what the kernel counts
as resident, pages of mapped files included, and must stay below the weights + 15 %; on disk, far below.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import show, write_json
from torch import Tensor

import zo_ds
from zo_ds.models.checkpoint import open_checkpoint
from zo_ds.stores.base import Stored
from zo_ds.stores.shards import write_weights
from zo_ds.trainer.environment import describe

_TARGETS = {"cpu, peak over weights": ("<=", 1.15), "nvme, peak over weights": ("<=", 1.15)}
_LIMIT = 0.5
"""Of the weights: what the process has in the case with too little memory."""


def make_checkpoint(folder: Path, billions: float, dtype: torch.dtype) -> int:
    """Write a random OPT model of about so many parameters, one tensor at a time; bytes of its weights."""
    width = 2048 if billions < 2 else 2560
    layers = max(1, round((billions * 1e9 - 50272 * width) / (12 * width * width)))
    config = transformers.OPTConfig(
        hidden_size=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=32,
        word_embed_proj_dim=width,
    )
    config.architectures = ["OPTForCausalLM"]
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    config.save_pretrained(folder)

    def drawn(number: int, shape: torch.Size) -> Stored:
        def read() -> Tensor:
            generator = torch.Generator().manual_seed(number)
            return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)

        return Stored(tuple(shape), dtype, read)

    entries = [(name, drawn(n, p.shape)) for n, (name, p) in enumerate(model.named_parameters())]
    write_weights(folder, entries)
    return sum(stored.nbytes for _, stored in entries)


def run_case(folder: Path, offload: dict[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """Load and take two steps in this process; what it took."""
    idle = _peak()
    begun = time.perf_counter()
    settings = transformers.AutoConfig.from_pretrained(folder)
    opened = open_checkpoint(transformers.AutoModelForCausalLM, str(folder), settings, dtype, None)
    assert opened is not None
    model, source = opened
    config = {
        "zero_optimization": {"stage": 3, "offload_param": offload},
        "zeroth_order": {"num_directions": 4, "activation_budget_mib": 64},
    }
    engine = zo_ds.initialize(model, config, weights=source)
    loaded, load_s = _peak(), time.perf_counter() - begun
    ids = torch.randint(5, 1000, (1, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    out = [engine.step(batch) for _ in range(2)]
    return {
        "libraries_gib": idle,
        "loaded_gib": loaded,
        "peak_gib": _peak(),
        "load_s": load_s,
        "step_s": out[1].seconds,
        "disk_read_gb": out[1].traffic.disk_read / 1e9,
        "disk_written_gb": out[1].traffic.disk_written / 1e9,
        "clean_loss": out[1].clean_loss,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def memory_limit(limit: int) -> Iterator[list[str] | None]:
    """The beginning of a command that runs under a limit; None where there is no cgroup to be made."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory" / "memory.limit_in_bytes").exists()
    group = root / ("memory" if old else "") / f"zo_ds-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield ["bash", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "bash"]
    finally:
        with suppress(OSError):
            group.rmdir()


def measure_all(folder: Path, dtype: str, weights: int) -> dict[str, Any]:
    """Every case in its own process."""
    found: dict[str, Any] = {}
    disk = {"device": "nvme", "nvme_path": str(folder / "nvme")}
    with memory_limit(int(_LIMIT * weights)) as limited:
        cases: dict[str, tuple[dict[str, str], list[str]]] = {"cpu": ({"device": "cpu"}, []), "nvme": (disk, [])}
        if limited is not None:
            cases[f"nvme, {_LIMIT:g} of the weights as memory"] = (disk, limited)
        for name, (offload, prefix) in cases.items():
            child = [__file__, "--child", json.dumps(offload), "--keep", str(folder), "--dtype", dtype]
            done = subprocess.run([*prefix, sys.executable, *child], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {json.dumps({k: round(v, 3) for k, v in found[name].items()})}", flush=True)
    return found


def main() -> None:
    """Read arguments and print figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--billions", type=float, default=1.3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint, made once and kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.child:
        print(json.dumps(run_case(args.keep, json.loads(args.child), dtype)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(describe(1, torch.get_num_threads())))
        weights = make_checkpoint(folder, args.billions, dtype)
        print(f"weights: {weights / 2**30:.2f} GiB")
        cases = measure_all(folder, args.dtype, weights)
        ratios = {f"{name}, peak over weights": case["peak_gib"] / (weights / 2**30) for name, case in cases.items()}
        show(ratios, _TARGETS)
        write_json(args.json, {"weights_gib": weights / 2**30, "cases": cases, "ratios": ratios})


if __name__ == "__main__":
    main()
