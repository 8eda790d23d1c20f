"""The runs of a study: what is finished, what comes next, and running it, several processes at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_plan import Planned, Run

from zo_ds.errors import DataError, MachineError, NonFiniteError
from zo_ds.files import make_folder, write_atomically
from zo_ds.trainer.report import clock

ROOT = Path(__file__).resolve().parents[1]
_DIVERGED = NonFiniteError.exit_code
_POLL_S = 0.2
_SHOW_S = 2.0


@dataclass(frozen=True)
class Point:
    """A score on the dev set.

    Attributes:
        step: updates before it.
        forwards: spent by then.
        loss: mean cross-entropy on the dev set.
        accuracy: share of right answers on the dev set, 0..1.
    """

    step: int
    forwards: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        run: the run.
        points: scores on the dev set, by step.
        result: its result.json; None if it diverged.
        commit: of the code it ran with.
    """

    run: Run
    points: tuple[Point, ...]
    result: Mapping[str, Any] | None
    commit: str

    @property
    def final_loss(self) -> float:
        """Dev loss at the end of the budget, which is what is tested; infinite if the run diverged."""
        last = self.points[-1].loss if self.points and self.result is not None else math.inf
        return last if math.isfinite(last) else math.inf


def record_of(run: Run, work: Path) -> Path:
    """The file that says how a run ended."""
    return work / f"{run.name}.json"


def read_outcome(run: Run, work: Path) -> Outcome | None:
    """What came of a run, None if it is not finished.

    Finished is a run whose record tells of the same recipe and overrides, and that has a result or has diverged.

    Raises:
        DataError: its files contradict the plan, or cannot be read.
    """
    record = _read(record_of(run, work))
    if record is None or record.get("recipe_sha256") != run.recipe_sha256:
        return None
    if record.get("overrides") != list(run.overrides):
        return None
    folder = work / run.name
    points, commit = _points(run, folder / "metrics.jsonl"), str(record.get("commit"))
    if record.get("exit_code") == _DIVERGED:
        return Outcome(run, points, None, commit)
    result = _read(folder / "result.json")
    if result is None:
        return None
    if result["steps"] != run.steps or result["forwards"] > run.forwards or not points or points[-1].step != run.steps:
        raise DataError(
            f"the run took {result['steps']} steps and {result['forwards']} forwards, planned were {run.steps} and "
            f"{run.forwards}, with a dev score at the end",
            where=str(folder),
            remedy="remove the folder; the study takes the run again",
        )
    return Outcome(run, points, result, commit)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("it is no JSON object")
        return tree
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            "what a run left cannot be read",
            where=str(file),
            why=str(error),
            remedy="remove the run's folder and its .json; the study takes the run again",
        ) from error


def _points(run: Run, file: Path) -> tuple[Point, ...]:
    found = {row["step"]: row for row in _rows(file) if row["kind"] == "dev"}
    return tuple(
        Point(step, step * run.forwards_per_step, float(row["loss"]), float(row["accuracy"]))
        for step, row in sorted(found.items())
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the row that is being written


def choose(grid: Sequence[Outcome]) -> float | None:
    """The learning rate with the least dev loss at the end; the smaller one of equals; None if all diverged."""
    loss, lr = min((outcome.final_loss, outcome.run.lr) for outcome in grid)
    return lr if math.isfinite(loss) else None


def known_runs(planned: Planned, done: Mapping[str, Outcome]) -> list[Run]:
    """The runs of a method as far as they are known: its grid and, once that is finished, the chosen rate's.

    Args:
        planned: the method.
        done: finished runs, by name.
    """
    grid = planned.grid
    if open_grid(planned, done):
        return grid
    lr = choose([done[run.name] for run in grid])
    return grid if lr is None else grid + planned.chosen(lr)[1:]


def forwards_left(planned: Planned, done: Mapping[str, Outcome]) -> int:
    """Forwards of a method's runs that are not finished, those included whose learning rate is not chosen yet."""
    left = sum(run.forwards for run in known_runs(planned, done) if run.name not in done)
    return left + (len(planned.seeds) - 1) * planned.forwards * open_grid(planned, done)


def open_grid(planned: Planned, done: Mapping[str, Outcome]) -> bool:
    """Whether runs are missing that the learning rate is chosen by."""
    return any(run.name not in done for run in planned.grid)


def commit() -> str:
    """The checked-out commit, with `+changes` if tracked files differ from it; `unknown` without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class _Active:
    """A run that is being taken: its process, the step it began at, the code's commit."""

    run: Run
    process: subprocess.Popen[bytes]
    begun_at: int
    commit: str


class Runner:
    """Takes the runs of methods, several at a time; what is finished is not taken again.

    Args:
        planned: the methods to run.
        work: where run directories, logs and records go.
        jobs: processes at a time.
        say: prints a line for each run that ended.
        show: prints what is going on, several times a minute; None: nobody looks.
    """

    def __init__(
        self,
        planned: Sequence[Planned],
        work: Path,
        jobs: int,
        say: Callable[[str], None],
        show: Callable[[str], None] | None = None,
    ) -> None:
        self._planned, self._work, self._jobs, self._say, self._show = planned, work, jobs, say, show
        self._active: dict[str, _Active] = {}
        self._done = read_all(planned, work)
        self._begun = self._shown = time.monotonic()
        self._taken = 0  # forwards of runs that ended since then

    def run(self) -> None:
        """Take all that is not finished; a run that was stopped halfway goes on.

        Raises:
            MachineError: a run failed otherwise than by diverging.
            DataError: a run left something else than what was planned.
        """
        make_folder(self._work)
        try:
            while True:
                waiting = self._waiting()
                for run in waiting[: self._jobs - len(self._active)]:
                    self._start(run)
                if not self._active:
                    return
                time.sleep(_POLL_S)
                for active in list(self._active.values()):
                    if active.process.poll() is not None:
                        self._end(active)
                if self._show is not None and time.monotonic() > self._shown + _SHOW_S:
                    self._shown = time.monotonic()
                    self._show(self._progress())
        finally:
            for active in self._active.values():
                active.process.terminate()  # they journal what they have; the next start goes on from there
            for active in self._active.values():
                active.process.wait()

    def _waiting(self) -> list[Run]:
        known = [run for planned in self._planned for run in known_runs(planned, self._done)]
        return [run for run in known if run.name not in self._done and run.name not in self._active]

    def _start(self, run: Run) -> None:
        folder = self._work / run.name
        # The quotes are YAML's, for any path.
        where = f"output.run_dir={json.dumps(str(folder.resolve()))}"
        command = [sys.executable, "-m", "zo_ds", "train", str(run.recipe), *run.overrides, where]
        with (self._work / f"{run.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches them once, from here
            )
        self._active[run.name] = _Active(run, process, _steps_taken(folder), commit())

    def _end(self, active: _Active) -> None:
        run, code = active.run, active.process.returncode
        del self._active[run.name]
        if code not in (0, _DIVERGED):
            log = self._work / f"{run.name}.log"
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            raise MachineError(
                f"the run {run.name} ended with exit code {code}",
                where=str(log),
                why="\n" + "\n".join(f"         {line}" for line in last),
                remedy="see the log; the same command goes on with what is left",
            )
        record = {
            "recipe_sha256": run.recipe_sha256,
            "overrides": list(run.overrides),
            "exit_code": code,
            "commit": active.commit,
        }
        write_atomically(record_of(run, self._work), json.dumps(record, indent=2) + "\n")
        outcome = read_outcome(run, self._work)
        if outcome is None:
            raise DataError("a run ended well and left no result", where=str(self._work / run.name))
        self._done[run.name] = outcome
        self._taken += (run.steps - active.begun_at) * run.forwards_per_step
        self._say(f"{_described(outcome)} | {self._progress()}")

    def _progress(self) -> str:
        ended = [run for planned in self._planned for run in known_runs(planned, self._done) if run.name in self._done]
        under_way = now = 0
        for active in self._active.values():
            steps = _steps_taken(self._work / active.run.name)
            under_way += steps * active.run.forwards_per_step
            now += (steps - active.begun_at) * active.run.forwards_per_step
        done = sum(run.forwards for run in ended) + under_way
        left = sum(forwards_left(planned, self._done) for planned in self._planned) - under_way
        parts = [
            f"{len(ended)}/{sum(planned.runs for planned in self._planned)} runs",
            f"{done:,}/{done + left:,} forwards",
            f"{len(self._active)} running",
        ]
        if self._taken + now > 0:
            parts.append(f"ETA {clock(left * (time.monotonic() - self._begun) / (self._taken + now))}")
        return " | ".join(parts)


def read_all(methods: Sequence[Planned], work: Path) -> dict[str, Outcome]:
    """The finished runs of methods, by name.

    Raises:
        DataError: files of a run contradict the plan, or cannot be read.
    """
    done: dict[str, Outcome] = {}
    for planned in methods:
        for _ in range(2):  # the chosen rate's runs are known once the grid is read
            for run in known_runs(planned, done):
                outcome = None if run.name in done else read_outcome(run, work)
                if outcome is not None:
                    done[run.name] = outcome
    return done


def _steps_taken(folder: Path) -> int:
    return max((row["step"] for row in _rows(folder / "metrics.jsonl") if row["kind"] == "train"), default=0)


def _described(outcome: Outcome) -> str:
    run = outcome.run
    name = f"{run.method} lr {run.lr:g} seed {run.seed}"
    if outcome.result is None:
        return f"{name}: diverged"
    last = outcome.points[-1]
    test = outcome.result["final_accuracy"]
    return f"{name}: dev loss {last.loss:.4f}, dev accuracy {last.accuracy:.4f}, test accuracy {test:.4f}"
