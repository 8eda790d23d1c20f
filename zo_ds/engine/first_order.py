"""FirstOrderEngine: AdamW or SGD under DeepSpeed, the baseline that zeroth-order runs are compared with.

Batches, loss function, evaluation and report are those of a zeroth-order run; only the step differs. Gradients are not
scalars, so there is no journal: a run that dies starts anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from zo_ds.config.schema import FirstOrderConfig
from zo_ds.engine.base import Engine, StepOutput
from zo_ds.engine.gradients import Differentiator
from zo_ds.errors import DataError, NonFiniteError, PeerError, StoppedError, of_a_collective
from zo_ds.forward.evaluator import Batch
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.schedules import scheduled
from zo_ds.parallel.channel import Channel, gone
from zo_ds.parallel.grid import Grid
from zo_ds.parallel.layout import Kind, Layout
from zo_ds.parallel.sums import add, exact_sums, from_words, mean, to_words
from zo_ds.stores.base import WeightStore
from zo_ds.tensor_files import Source

FORWARDS_PER_UNIT = 3
"""Forward-equivalents of a forward with its backward: the backward has two matrix products (for the gradient of the
inputs and of the weights) for each of the forward's one. (The FZOO paper counts 1 + 3 = 4.)"""
_UNEQUAL = -1


@dataclass(frozen=True)
class _Found:
    """What all ranks found in a step.

    Attributes:
        loss: mean over all examples, nan if one is not finite.
        bad: examples whose loss is not finite.
        finite: whether every gradient is.
        stop: a rank was asked to stop.
    """

    loss: float
    bad: int
    finite: bool
    stop: bool


class FirstOrderEngine(Engine):
    """Wraps a model that DeepSpeed holds; made by `initialize_first_order`.

    Where the zeroth-order engine's surface has a meaning here, it is the same.

    Args:
        config: optimizer and constants.
        total_steps: length of the run, for schedules that decay.
        store: holds the weights.
        evaluator: gives losses and their gradients.
        channel: to the other ranks; gradients do not cross on it but in DeepSpeed's world, which is all ranks.
        deepspeed: the DeepSpeed engine underneath, with the optimizer.
        grid: who computes which micro-batches.
    """

    def __init__(
        self,
        config: FirstOrderConfig,
        total_steps: int,
        store: WeightStore,
        evaluator: Differentiator,
        channel: Channel,
        deepspeed: DeepSpeedEngine,
        grid: Grid,
    ) -> None:
        super().__init__(
            store, evaluator, channel, deepspeed, grid, Layout(Kind.SOLO, channel.rank, channel.world_size)
        )
        self.config, self._total_steps, self._differentiator = config, total_steps, evaluator
        self._gradient_bytes = self._skipped = 0

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that stay on this rank's device through a step: of ``weights``, ``gradients`` and ``optimizer``.

        Measured, not computed: gradients and optimizer states exist from the first step on. Activations come on top,
        with the 16-bit copies of matrices that a bfloat16 model's backward needs, and the buffer, as large as the
        gradients up to 2 GB, that DeepSpeed sends those of several ranks from.
        """
        states = (state for states in self.deepspeed.optimizer.state.values() for state in states.values())
        return {
            "weights": sum(parameter.nbytes for parameter in self.module.parameters()),
            "gradients": self._gradient_bytes,
            "optimizer": sum(state.nbytes for state in states if isinstance(state, Tensor)),
        }

    def step(self, batch: Batch, spare: Batch | None = None) -> StepOutput:
        """Take one step along the mean gradient over all examples of all ranks.

        Args:
            batch: this rank's examples: one micro-batch, or a list of them, empty if others have some. All of them must
                have the same number of examples.
            spare: not needed here.

        Returns:
            The clean loss is the mean over the batch before the update. There are no directions: no coefficients, and
            a spread and eps of 0. ``forwards`` counts `FORWARDS_PER_UNIT` for each micro-batch, ``sent`` takes the
            gradients' all-reduce for a ring's.

        Raises:
            DataError: there is no batch.
            ConfigError: the loss has no gradient.
            NonFiniteError: the last `max_consecutive_skips` steps were all skipped.
            PeerError: a rank is gone, or micro-batches differ in size.
            StoppedError: a rank was asked to stop.
        """
        with self._group_alive():
            return self._step(batch if isinstance(batch, list) else [batch])

    def _step(self, units: list[Batch]) -> StepOutput:
        started, sent = time.perf_counter(), self.channel.sent
        step, (lr, eps) = self.steps_done, self.scheduled(self.steps_done)
        count = sum(int(other) for other in self.channel.all_gather(torch.tensor([len(units)])))
        if not count:
            raise DataError("a step needs at least one micro-batch", where="engine.step(batch)")
        found = self._agreed([self._gradient(unit, count) for unit in units], count)
        skip = None if found.finite and math.isfinite(found.loss) else SkipReason.NON_FINITE
        if skip is None:
            self._update(lr)
        self.deepspeed.zero_grad()
        self.steps_done += 1
        self._note(skip, found, step)
        if found.stop:
            raise StoppedError(
                f"stopped after step {step + 1}, as asked",
                why="a first-order run has no journal",
                remedy="the same command starts it anew",
            )
        # A ring passes nearly every gradient on twice: once to be added up, once as the sum.
        ranks = self.channel.world_size
        ring = 2 * (ranks - 1) * self._gradient_bytes // ranks if skip is None else 0
        return StepOutput(
            step=step,
            clean_loss=found.loss,
            spread=0.0,
            coefficients=torch.zeros(0),
            skip=skip,
            lr=lr,
            eps=eps,
            forwards=FORWARDS_PER_UNIT * count,
            seconds=time.perf_counter() - started,
            sent=self.channel.sent - sent + ring,
        )

    def _gradient(self, unit: Batch, count: int) -> Tensor:
        """Losses of a unit; its part of the gradient is added to what is there."""

        def backward(loss: Tensor) -> None:
            self.deepspeed.backward(loss, scale_wrt_gas=False)

        # DeepSpeed divides the sum over ranks by their number.
        return self._differentiator.gradient(unit, self.channel.world_size / count, backward)

    def _agreed(self, losses: list[Tensor], count: int) -> _Found:
        """What the ranks found, the same on all of them."""
        gradients = self._gradients()
        self._gradient_bytes = sum(gradient.nbytes for gradient in gradients)
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        sizes = {each.numel() for each in losses}
        size = min(sizes, default=0) if len(sizes) < 2 else _UNEQUAL
        bad = sum(int((~each.isfinite()).sum()) for each in losses)
        total = add([part for each in losses for part in exact_sums(each.unsqueeze(0))])
        message = torch.tensor([size, bad, bool(length.isfinite()), self._stop_requested(), 0, 0])
        message[4:] = to_words([total])
        told = self.channel.all_gather(message)
        heads = [[int(value) for value in other[:4]] for other in told]
        found = {head[0] for head in heads} - {0}
        if len(found) != 1 or _UNEQUAL in found:
            raise PeerError(
                "micro-batches differ in size",
                where=f"rank {self.channel.rank}, step {self.steps_done}",
                why=f"examples in each ({_UNEQUAL} if they differ) by rank: {[head[0] for head in heads]}",
                remedy="give all micro-batches the same number of examples (drop_last=True)",
            )
        sums = [part for other in told for part in from_words(other[4:])]
        loss = mean(add(sums), count * found.pop())
        return _Found(loss, sum(head[1] for head in heads), all(h[2] for h in heads), any(h[3] for h in heads))

    def _gradients(self) -> list[Tensor]:
        """Of all that is trained; zeros where no unit of this rank reached a parameter."""
        for parameter in self.store.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.store.parameters if parameter.grad is not None]

    def _update(self, lr: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()

    def _note(self, skip: SkipReason | None, found: _Found, step: int) -> None:
        self._skipped = 0 if skip is None else self._skipped + 1
        if self._skipped >= self.config.max_consecutive_skips:
            raise NonFiniteError(
                f"the last {self._skipped} steps were all skipped",
                where=f"step {step}",
                why=f"the loss of {found.bad} examples is not finite" if found.bad else "a gradient is not finite",
                remedy="lower first_order.lr, set first_order.max_grad_norm, or look at the examples of these steps",
            )

    @contextmanager
    def _group_alive(self) -> Iterator[None]:
        """See `Engine._group_alive`; all ranks are in DeepSpeed's world here, though each holds all weights."""
        try:
            yield
        except RuntimeError as error:
            if self.channel.world_size == 1 or not of_a_collective(error):
                raise
            raise gone(f"rank {self.channel.rank}, step {self.steps_done}", str(error).splitlines()[0]) from error

    def load_weights(self, weights: Mapping[str, Tensor] | Source) -> None:
        """See `Engine.load_weights`. The optimizer forgets its means, which belong to other weights."""
        super().load_weights(weights)
        self.deepspeed.optimizer.state.clear()

    def scheduled(self, step: int) -> tuple[float, float]:
        """(lr, 0) of a step: nothing is displaced, so there is no eps."""
        config = self.config
        lr = scheduled(
            config.lr,
            config.lr_schedule,
            step,
            self._total_steps,
            warmup_steps=config.warmup_steps,
            final_ratio=config.final_ratio,
        )
        return lr, 0.0
