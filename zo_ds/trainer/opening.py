"""Which run directory a job has, and what an earlier process left in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_ds.config.identity import FREE_OF_RESULT, Difference
from zo_ds.errors import ConfigError, MachineError, ZODSError
from zo_ds.parallel.channel import Channel, on_rank_0
from zo_ds.trainer.job import Plan
from zo_ds.trainer.report import log
from zo_ds.trainer.run_dir import RunDir, changes, default_run_dir, find_unfinished, read_result, refuse_changes
from zo_ds.trainer.state import RunState


@dataclass(frozen=True)
class Opening:
    """What rank 0 found in the run directory, told to all.

    Attributes:
        path: of the directory.
        state: of the run.
        forked: changes of the mathematics that the user wants.
        finished: there is nothing left to do.
        fresh: the run begins here.
    """

    path: Path
    state: RunState
    forked: list[str]
    finished: bool
    fresh: bool


def open_run_dir(plan: Plan, threads: int, channel: Channel) -> tuple[RunDir | None, Opening]:
    """The run directory on rank 0, and what is in it, on all ranks; collective.

    Raises:
        ConfigError: the recipe contradicts the run in it.
        MachineError: it cannot be used.
    """

    def look() -> tuple[RunDir, dict[str, Any]]:
        path = _choose(plan, threads)
        run_dir = RunDir(path)
        try:
            state, forked, fresh = _look(run_dir, plan, plan.resolved(threads, path))
        except ZODSError:
            run_dir.close()
            raise
        return run_dir, {
            "path": str(path),
            "state": state.to_json(),
            "forked": forked,
            "fresh": fresh,
            "finished": not forked and _finished(path, plan, state, fresh=fresh),
        }

    run_dir, told = on_rank_0(channel, look) or (None, {})
    told = json.loads(channel.broadcast(json.dumps(told).encode()))
    state = RunState.from_json(told["state"], "state.json")
    return run_dir, Opening(Path(told["path"]), state, told["forked"], told["finished"], told["fresh"])


def _choose(plan: Plan, threads: int) -> Path:
    config = plan.config
    if config.output.run_dir is not None:
        return Path(config.output.run_dir)
    if config.resume == "auto":
        unfinished = find_unfinished(config.name, plan.resolved(threads, Path("runs")), plan.data_sha256())
        if unfinished is not None:
            log.info("%s", f"going on with the unfinished run {unfinished} (resume=never starts another one)")
            return unfinished
    return default_run_dir(config.name)


def _look(run_dir: RunDir, plan: Plan, resolved: dict[str, Any]) -> tuple[RunState, list[str], bool]:
    """(state, forked changes, whether the run is new)."""
    path, data = run_dir.path, plan.data_sha256()
    ended = (path / "resolved.yaml").is_file() and read_result(path) is not None
    if not (run_dir.journalled or ended):
        return RunState(data), [], True  # nothing was done here that a changed recipe could contradict
    if plan.config.resume == "never":
        raise MachineError(
            "the run directory already holds a run",
            where=str(path),
            why="resume is never",
            remedy="choose another output.run_dir, or leave resume away to go on with it",
        )
    if not run_dir.journalled:
        _keep_result(run_dir, resolved, data)
        return RunState(data), [], True
    if not (path / "resolved.yaml").is_file():
        return RunState(data), [], False
    changed, rounding = changes(path, resolved)
    state = run_dir.state() or RunState(data)
    if state.data_sha256 != data:
        changed.append(Difference("data (training examples)", state.data_sha256[:12], data[:12]))
    if plan.config.resume != "fork":
        refuse_changes(path, changed)
    for difference in rounding:
        log.info("%s", f"going on with another setting that may change the last bits: {difference}")
    state.data_sha256, state.starts = data, state.starts + 1
    return state, [str(difference) for difference in changed], False


def _keep_result(run_dir: RunDir, resolved: dict[str, Any], data: str) -> None:
    """Refuse to replace what a run without a journal gave by what another recipe gives."""
    changed, rounding = changes(run_dir.path, resolved, FREE_OF_RESULT)
    state = run_dir.state()
    if state is not None and state.data_sha256 != data:
        changed.append(Difference("data (training examples)", state.data_sha256[:12], data[:12]))
    if changed or rounding:
        raise ConfigError(
            "the run directory holds the result of another recipe:\n"
            + "\n".join(f"  - {difference}" for difference in (*changed, *rounding)),
            where=str(run_dir.path / "result.json"),
            why="it has no journal to go on from, and would be replaced",
            remedy="choose another output.run_dir, or remove the directory if nobody needs it",
        )


def _finished(path: Path, plan: Plan, state: RunState, *, fresh: bool) -> bool:
    """Whether nothing is left to do."""
    result = read_result(path) if (path / "resolved.yaml").is_file() else None
    if result is None:
        return False
    training = plan.config.training
    stopped = state.out_of_patience(training.patience, training.best_by)
    return bool(fresh or stopped or result["steps"] >= training.steps)
