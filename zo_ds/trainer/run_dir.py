"""The directory of a run: one owner, and files that explain the run without the program."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from zo_ds.errors import DataError, MachineError
from zo_ds.files import write_atomically

_README = """\
# A zo_ds run

| file | what it is |
|---|---|
| config.yaml | the recipe as given, with the command line's overrides as comments |
| resolved.yaml | every setting as used; `zo_ds train resolved.yaml` repeats the run |
| ds_config.json | what DeepSpeed was started with, on each rank |
| env.json | machine and library versions |
| journal.jsonl | the run itself: the scalars of every step (with the base model, all that is needed to replay it) |
| metrics.jsonl, tensorboard/ | losses, speed and evaluations |
| log.txt, log-rankN.txt | what was printed, by rank |
| model/ | the best model on the dev set, for `from_pretrained` |
| result.json | the outcome |

    zo_ds eval {run}      # score model/ on the test set again
    zo_ds replay {run}    # base model + journal -> the same weights, bit for bit
"""


class RunDir:
    """A run directory that this process owns until it is closed.

    Args:
        path: made if it is not there.

    Raises:
        MachineError: another process owns it, it holds a run already, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"cannot make the run directory: {error.strerror}",
                where=str(path),
                remedy="choose another output.run_dir",
            ) from error
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise MachineError(
                "the run directory is used by another process",
                where=str(path),
                why=_owner(path),
                remedy="wait for it or stop it, or choose another output.run_dir",
            ) from error
        if (path / "journal.jsonl").exists():
            self.close()
            raise MachineError(
                "the run directory already holds a run",
                where=str(path / "journal.jsonl"),
                remedy=f"choose another output.run_dir; `zo_ds replay {path}` rebuilds the weights of this one",
            )
        (path / ".owner").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def close(self) -> None:
        """Let others use the directory."""
        self._lock.release()

    def discard(self) -> None:
        """Undo the making of the directory, for a run that was refused; what was there before stays."""
        (self.path / ".owner").unlink(missing_ok=True)
        self.close()
        (self.path / ".lock").unlink(missing_ok=True)
        for folder in self._made:
            folder.rmdir()

    def explain(self, given: str, overrides: list[str], resolved: dict[str, Any], deepspeed: dict[str, Any]) -> None:
        """Write README.md, the configurations and env.json."""
        comments = "".join(f"# override: {item}\n" for item in overrides)
        self.write("README.md", _README.format(run=self.path))
        self.write("config.yaml", given + ("\n" if comments and not given.endswith("\n") else "") + comments)
        self.write("resolved.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        self.write_json("ds_config.json", deepspeed)

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, tree: dict[str, Any]) -> None:
        """Write a JSON file atomically."""
        self.write(name, json.dumps(tree, indent=2) + "\n")


def _owner(path: Path) -> str:
    try:
        return (path / ".owner").read_text().strip()
    except OSError:
        return "its owner left no name"


def default_run_dir(name: str) -> Path:
    """runs/NAME-DATE-TIME, with a number behind it if that is taken."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / stem
    count = 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{stem}-{count}"
    return path


def read_result(run: Path) -> dict[str, Any] | None:
    """result.json of a run, or None if it did not finish.

    Raises:
        DataError: there is no such run directory.
    """
    if not (run / "resolved.yaml").is_file():
        raise DataError(
            "this is not a run directory",
            where=str(run),
            why="it has no resolved.yaml",
            remedy="give one, e.g. runs/NAME",
        )
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
    except FileNotFoundError:
        return None
    return result
