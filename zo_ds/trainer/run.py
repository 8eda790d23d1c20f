"""Everything that a method needs to make a run of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zo_ds.models.load import LoadedModel
from zo_ds.parallel.channel import Channel
from zo_ds.tasks.ask import Asking
from zo_ds.trainer.job import Plan
from zo_ds.trainer.opening import Opening
from zo_ds.trainer.run_dir import RunDir


@dataclass(frozen=True)
class Run:
    """What a run is put together from.

    Attributes:
        plan: the recipe, checked, and its data.
        loaded: the model.
        asking: how the task is put to it.
        channel: to the other ranks.
        run_dir: on rank 0; None on the others.
        opening: what an earlier process left.
        launched: the parent is a launcher.
        started: when this process began, by the performance counter.
        explain: writes recipe and environment into the run directory.
    """

    plan: Plan
    loaded: LoadedModel
    asking: Asking
    channel: Channel
    run_dir: RunDir | None
    opening: Opening
    launched: bool
    started: float
    explain: Callable[[], None]

    @property
    def path(self) -> Path:
        """Of the run directory."""
        return self.opening.path

    @property
    def shown(self) -> Path | None:
        """Of the run directory, on the rank that writes there."""
        return self.opening.path if self.run_dir is not None else None
