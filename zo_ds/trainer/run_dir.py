"""The directory of a run: one owner, and files that explain the run without the program."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from zo_ds.config.identity import FREE, Difference, differences
from zo_ds.errors import ConfigError, DataError, MachineError
from zo_ds.files import discard, write_atomically
from zo_ds.journal.lock import RunLock, is_locked
from zo_ds.trainer.state import RunState

_README = """\
# A zo_ds run

| file | what it is |
|---|---|
| config.yaml | the recipe as given, with the command line's overrides as comments |
| resolved.yaml | every setting as used; `zo_ds train resolved.yaml` goes on with the run or repeats it elsewhere |
| ds_config.json | what DeepSpeed was started with, on each rank |
| env.json | machine and library versions |
| journal/ | the run itself: the scalars of every step (with the base model, all that is needed to replay it) |
| snapshots/ | weights after some steps, to shorten replay of a long run; may be removed |
| state.json | scores so far |
| metrics.jsonl, tensorboard/ | losses, speed and evaluations |
| log.txt, log-rankN.txt | what was printed, by rank |
| model/ | the best model on the dev set, for `from_pretrained`; of a run with `peft`, the adapter |
| start/ | what a prefix began with, where the model computed it; replay needs it |
| result.json | the outcome |

    zo_ds eval {run}      # score model/ on the test set again
    zo_ds replay {run}    # base model + journal -> the same weights, bit for bit
    zo_ds audit {run}     # replay, and compare with every hash taken while the run ran
    zo_ds journal {run}   # the journal as JSON lines
    zo_ds export {run} --as journal tuned.zoj    # the fine-tune as one small file
"""


class RunDir:
    """A run directory that this process owns until it is closed.

    Args:
        path: made if it is not there.

    Raises:
        MachineError: another process owns it, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = RunLock(path)
        for leftover in path.glob(".*.tmp"):
            discard(leftover)

    @property
    def journalled(self) -> bool:
        """Whether a run has begun to take steps here."""
        return any((self.path / "journal").glob("*.zoj"))

    def close(self) -> None:
        """Let others use the directory."""
        self._lock.release()

    def discard(self) -> None:
        """Undo the making of the directory, for a run that was refused; what was there before stays."""
        self._lock.discard()

    def explain(self, given: str, overrides: list[str], resolved: dict[str, Any], deepspeed: dict[str, Any]) -> None:
        """Write README.md, the configurations and env.json."""
        comments = "".join(f"# override: {item}\n" for item in overrides)
        self.write("README.md", _README.format(run=self.path))
        self.write("config.yaml", given + ("\n" if comments and not given.endswith("\n") else "") + comments)
        self.write("resolved.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        self.write_json("ds_config.json", deepspeed)

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically.

        Raises:
            MachineError: the disk refused it.
        """
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise MachineError(
                f"cannot write to the run directory: {error.strerror}",
                where=str(self.path / name),
                remedy="free some space; the journal is safe, the same command goes on",
            ) from error

    def write_json(self, name: str, tree: dict[str, Any]) -> None:
        """Write a JSON file atomically."""
        self.write(name, json.dumps(tree, indent=2) + "\n")

    def retire_result(self) -> None:
        """Keep the result of a shorter run under another name: its model is going to be replaced."""
        result = read_result(self.path) if (self.path / "resolved.yaml").is_file() else None
        if result is not None:
            os.replace(self.path / "result.json", self.path / f"result-{result['steps']}.json")

    def state(self) -> RunState | None:
        """What earlier lives of the run found out; None if it was not kept.

        Raises:
            CorruptRunError: the file is no state.
        """
        file = self.path / "state.json"
        return RunState.from_json(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def changes(
    path: Path, resolved: dict[str, Any], free: tuple[str, ...] = FREE
) -> tuple[list[Difference], list[Difference]]:
    """How a recipe differs from that of the run in a directory, see `zo_ds.config.identity.differences`.

    Raises:
        DataError: the run's resolved.yaml cannot be read.
    """
    return differences(read_yaml_file(path / "resolved.yaml"), json.loads(json.dumps(resolved)), free)


def read_yaml_file(file: Path) -> dict[str, Any]:
    """The resolved recipe of a run as plain data.

    Raises:
        DataError: it cannot be read.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError("the run's recipe cannot be read", where=str(file), why=str(error)) from error
    return dict(tree)


def refuse_changes(path: Path, changed: list[Difference]) -> None:
    """Say that a run cannot go on with other mathematics.

    Raises:
        ConfigError: something changed.
    """
    if changed:
        raise ConfigError(
            "this recipe is not that of the run in the directory:\n"
            + "\n".join(f"  - {difference}" for difference in changed),
            where=str(path / "resolved.yaml"),
            why="going on would mix two experiments in one journal",
            remedy="undo the changes, choose another output.run_dir, or mix them on purpose: resume=fork",
        )


def find_unfinished(name: str, resolved: dict[str, Any], data_sha256: str) -> Path | None:
    """The newest run of the same recipe and examples in runs/ that is neither finished nor running."""
    for path in sorted(Path("runs").glob(f"{name}-*"), key=lambda p: p.stat().st_mtime, reverse=True):
        if not (path / "state.json").is_file() or (path / "result.json").exists() or is_locked(path):
            continue
        if not (path / "resolved.yaml").is_file() or any(changes(path, resolved)):
            continue
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.get("data_sha256") == data_sha256:
            return path
    return None


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
