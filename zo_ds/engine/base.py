"""What engines have in common: a model that DeepSpeed holds, other ranks, an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from zo_ds.engine.export import Saveable, save_pretrained
from zo_ds.errors import of_a_collective
from zo_ds.forward.evaluator import Batch, Evaluator, Result
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.names import is_adapted
from zo_ds.parallel.channel import Channel, gone
from zo_ds.parallel.grid import Grid
from zo_ds.parallel.layout import Layout
from zo_ds.parallel.world import leave_world
from zo_ds.stores.base import Traffic, WeightStore
from zo_ds.tensor_files import Source


@dataclass(frozen=True)
class StepOutput:
    """What a step did, the same on every rank.

    Attributes:
        step: 0-based.
        clean_loss: mean loss at the weights before the update.
        spread: standard deviation of the perturbed losses.
        coefficients: fp32 [N], of this step's own directions, before momentum.
        skip: None, or why the weights were left alone.
        lr, eps: of this step.
        forwards: forward passes of the whole job, in units of work.
        seconds: wall time.
        sent: bytes that this rank gave to others, without what the network adds.
        traffic: bytes of weights that this rank moved.
    """

    step: int
    clean_loss: float
    spread: float
    coefficients: Tensor
    skip: SkipReason | None
    lr: float
    eps: float
    forwards: int
    seconds: float
    sent: int = 0
    traffic: Traffic = field(default_factory=Traffic)


class Engine:
    """A model at weights that a step changes.

    Args:
        store: holds the weights.
        evaluator: gives losses.
        channel: to the other ranks.
        deepspeed: the DeepSpeed engine underneath.
        grid: which micro-batches and directions this rank computes.
        layout: which ranks hold the weights together.
    """

    def __init__(
        self,
        store: WeightStore,
        evaluator: Evaluator,
        channel: Channel,
        deepspeed: DeepSpeedEngine,
        grid: Grid,
        layout: Layout,
    ) -> None:
        self.store, self.channel, self.deepspeed, self.grid, self.layout = store, channel, deepspeed, grid, layout
        self.steps_done = 0
        self._evaluator = evaluator
        self._at_close: list[Callable[[], None]] = []
        self._stop_requested: Callable[[], bool] = lambda: False

    @property
    def module(self) -> torch.nn.Module:
        """The model. Its weights change only in `step`."""
        return self.store.module

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self.deepspeed.device)

    def stop_when(self, requested: Callable[[], bool]) -> None:
        """Ask after every step whether to stop; one rank's yes stops all of them after the same step."""
        self._stop_requested = requested

    def at_close(self, action: Callable[[], None]) -> None:
        """Do something when the run is over, see `close_journal`."""
        self._at_close.append(action)

    def losses(self, batch: Batch) -> Tensor:
        """Per-example losses at the current weights, fp64 [n] on the CPU, of this rank's batch alone."""
        return self._evaluator.losses(batch, [None])[0]

    def call(self, function: Callable[[torch.nn.Module, Batch], Result], batch: Batch) -> Result:
        """``function(model, batch)`` at the current weights: evaluation mode, no gradients, the step's autocast."""
        with self._group_alive():
            return self._evaluator.call(function, batch)

    @contextmanager
    def _group_alive(self) -> Iterator[None]:
        """What DeepSpeed meets when a rank of its world is gone, in the words of the job."""
        try:
            yield
        except RuntimeError as error:
            if not self.layout.lockstep or not of_a_collective(error):
                raise
            where = f"rank {self.layout.rank}, group of ranks {list(self.layout.members)}"
            raise gone(where, str(error).splitlines()[0], "a rank of this shard group") from error

    def digest(self) -> str:
        """SHA-256 of the trained weights."""
        with self._group_alive():
            return self.store.digest()

    def save_pretrained(
        self, folder: str | Path, tokenizer: Saveable | None = None, note: Mapping[str, Any] | None = None
    ) -> None:
        """Write the model in Hugging Face layout, or an adapter in peft's, atomically; only rank 0 writes.

        Args:
            folder: a model that is there already is replaced.
            tokenizer: saved beside the model.
            note: where the weights come from, kept as zo_ds.json.

        Raises:
            MachineError: the folder cannot be written.
        """
        with self._group_alive():
            if self.channel.rank == 0:
                save_pretrained(self.store, Path(folder), tokenizer, note)
            elif self.layout.replica == 0 and self.store.collective:
                self.store.take_part(frozen=not is_adapted(self.module))
        self.channel.barrier()

    def load_weights(self, weights: Mapping[str, Tensor] | Source) -> None:
        """Overwrite the trained weights, for example with those of the best step; collective.

        Args:
            weights: whole parameters by name, or what fills each one's part that this rank holds.
        """
        if isinstance(weights, Mapping):
            self.store.load(weights)
        else:
            self.store.fill(weights, frozen=False)
        self.settle()

    def settle(self) -> None:
        """Wait until all parts of the weights that this rank sees have been written; collective."""
        if self.layout.shares_memory:
            self.channel.barrier()

    def close(self) -> None:
        """Close the journal, let go of offloaded or sharded weights and leave the job's channel.

        Call it once, at the end, on every rank: what is to stay of the weights has been saved or exported before.
        """
        self.close_journal()
        self.store.close()
        self.channel.close()
        leave_world()

    def close_journal(self) -> None:
        """Do what `at_close` was told; an engine with a journal makes it durable first."""
        while self._at_close:
            self._at_close.pop()()
