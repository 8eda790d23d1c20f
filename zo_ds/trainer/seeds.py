"""`zo_ds seeds`: one recipe with several seeds, each in processes of its own, and what they have in common."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from zo_ds.errors import ConfigError, MachineError
from zo_ds.files import write_atomically
from zo_ds.trainer.run_dir import read_result

_SEEDED = ("data.seed", "zeroth_order.run_seed", "peft.seed")
_STDERR = 2
_ENTRY = Path(__file__).parents[2] / "launch" / "finetune.py"


def run_seeds(config: Path, overrides: list[str], count: int, folder: Path, launcher: str) -> dict[str, Any]:
    """Run a recipe with the seeds 0, 1, ...; those that finished take no step again, so that a killed command goes on.

    Args:
        config: of the recipe.
        overrides: from the command line.
        count: how many seeds.
        folder: each run has a folder in it, FOLDER/seed-0 and so on; summary.json is written beside them.
        launcher: command that starts ranks, before the script; empty: one process.

    Returns:
        For each number in result.json: mean, standard deviation (n - 1) and the values.

    Raises:
        ConfigError: the overrides set a seed or the run directory.
        MachineError: a run failed.
    """
    taken = [item for item in overrides if item.split("=")[0] in (*_SEEDED, "output.run_dir")]
    if taken:
        raise ConfigError(
            f"'{taken[0]}' cannot be set here",
            where="zo_ds seeds",
            why=f"this command sets {', '.join(_SEEDED)} and output.run_dir",
            remedy="leave it away; --out says where the runs go",
        )
    results = [_run(config, overrides, seed, folder / f"seed-{seed}", launcher) for seed in range(count)]
    numbers = [key for key, value in results[0].items() if type(value) in (int, float) and key != "starts"]
    summary = {
        "recipe": str(config),
        "overrides": overrides,
        "seeds": count,
        **{key: _spread([result[key] for result in results]) for key in numbers},
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _run(config: Path, overrides: list[str], seed: int, path: Path, launcher: str) -> dict[str, Any]:
    if launcher and not _ENTRY.is_file():
        raise ConfigError(
            "launch/finetune.py, which launchers start, is not there",
            where="zo_ds seeds --launcher",
            why="it belongs to the repository, not to the installed package",
            remedy="run this from a clone, or leave --launcher away",
        )
    command = [*shlex.split(launcher), str(_ENTRY)] if launcher else [sys.executable, "-m", "zo_ds", "train"]
    command += ["--config", str(config)] if launcher else [str(config)]
    settings = [f"{key}={seed}" for key in _SEEDED]
    command += [*overrides, *settings, f"output.run_dir={path}"]
    # A finished run is asked too: only it knows whether it is one of this recipe. Standard output is for the summary.
    code = subprocess.run(command, stdout=_STDERR, check=False).returncode
    result = read_result(path) if (path / "resolved.yaml").is_file() else None
    if code or result is None:
        raise MachineError(
            f"the run with seed {seed} ended with exit code {code}",
            where=str(path),
            why="its own message stands above, and in log.txt there",
            remedy="mend it; the same command goes on with the seeds that are missing",
        )
    return result


def _spread(values: list[Any]) -> dict[str, Any]:
    known = [value for value in values if isinstance(value, (int, float))]
    if len(known) < 2:
        return {"values": values}
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known), "values": values}
