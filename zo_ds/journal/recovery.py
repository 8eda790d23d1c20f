"""From where a run goes on: the place from which the journal reaches furthest, with weights that were checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zo_ds.errors import CorruptRunError
from zo_ds.journal.history import History
from zo_ds.journal.snapshot import committed, quarantine, read_info, verify


@dataclass(frozen=True)
class Start:
    """Where to begin.

    Attributes:
        step: steps that the weights at hand have seen.
        snapshot: folder of these weights, None for the base model.
        end: steps that the journal leads to from there.
    """

    step: int
    snapshot: Path | None
    end: int


def choose_start(
    history: History, snapshots: Path, warn: Callable[[str], None], last: int | None = None, move: bool = True
) -> Start:
    """The start with the furthest end; among equals the one with the fewest steps to replay.

    Snapshots are verified before they are chosen.

    Args:
        history: the run's journal.
        snapshots: folder of its snapshots.
        warn: told what is damaged.
        last: do not start behind this step.
        move: move damaged snapshots aside; the caller must own the run.

    Raises:
        CorruptRunError: neither the base weights nor any snapshot lead anywhere.
    """
    candidates: list[tuple[int, int, Path | None]] = []
    base_end = history.end_of(0)
    begun = {segment.header.segment: segment.begun for segment in history.segments}
    if base_end is not None:
        candidates.append((base_end, 0, None))
    for folder in committed(snapshots):
        try:
            info = read_info(folder)
        except CorruptRunError as error:
            _set_aside(folder, error, warn, move)
            continue
        end = history.end_of(info.step)
        if info.run_id == history.header.run_id and begun.get(info.segment, info.chain) != info.chain:
            other = CorruptRunError("a snapshot is of other steps than the journal", where=str(folder))
            _set_aside(folder, other, warn, move)
            continue
        if end is not None and info.run_id == history.header.run_id and (last is None or info.step <= last):
            candidates.append((end, info.step, folder))
    for end, step, snapshot in sorted(candidates, key=lambda c: (c[0], c[1]), reverse=True):
        if snapshot is None:
            return Start(step, None, end)
        try:
            verify(snapshot)
        except CorruptRunError as error:
            _set_aside(snapshot, error, warn, move)
            continue
        return Start(step, snapshot, end)
    raise history.damage(0)


def drop_later(snapshots: Path, end: int, warn: Callable[[str], None]) -> None:
    """Move snapshots aside that lie behind what the journal knows: their steps are going to be taken again."""
    for folder in committed(snapshots):
        if read_info(folder).step > end:
            warn(f"{folder} lies behind the journal's last step and is set aside: {quarantine(folder)}")


def _set_aside(folder: Path, error: CorruptRunError, warn: Callable[[str], None], move: bool) -> None:
    warn(f"{error.what}: {error.where} ({error.why}){f'; kept as {quarantine(folder)}' if move else ''}")
