"""The sequential evaluator: one forward for each direction, correct for any module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.forward.buffers import BufferGuard
from zo_ds.forward.perturber import Displacement, Perturber

Batch = Any
Result = TypeVar("Result")
LossFunction = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> per-example losses [n], or one scalar. It need not be differentiable."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own ``.loss``, a scalar.

    Raises:
        ConfigError: the model returned none (a batch without labels, most often).
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ConfigError(
            "the model returned no loss",
            where="engine.step(batch)",
            why="without loss_fn the model's own '.loss' is minimised, and it is computed only if the batch has labels",
            remedy="add 'labels' to the batch, or pass loss_fn(model, batch) to zo_ds.initialize",
        )
    return loss if isinstance(loss, Tensor) else torch.as_tensor(loss)


class SequentialEvaluator:
    """Evaluates per-example losses at theta or at a displaced theta, one forward at a time.

    Args:
        module: the model.
        perturber: shows it the displaced weights.
        loss_fn: from model and batch to losses.
        autocast_dtype: dtype of matrix products if matrices are 16-bit, else None.
        device_type: where the model runs; parameters cannot tell while ZeRO-3 keeps them elsewhere.
    """

    def __init__(
        self,
        module: nn.Module,
        perturber: Perturber,
        loss_fn: LossFunction,
        autocast_dtype: torch.dtype | None,
        device_type: str = "cpu",
    ) -> None:
        self._module, self._perturber, self._loss_fn = module, perturber, loss_fn
        self._autocast_dtype, self._device_type = autocast_dtype, device_type
        self._buffers = BufferGuard(module)
        self._surveyed = False

    def losses(self, batch: Batch, displacements: Sequence[Displacement | None]) -> Tensor:
        """Losses of one unit of work under each displacement.

        Args:
            batch: whatever the loss function takes.
            displacements: None stands for theta itself.

        Returns:
            fp64 [displacements, examples] on the CPU.

        Raises:
            ConfigError: the loss function returned neither a scalar nor a vector.
        """
        if not self._surveyed:
            self._perturber.survey(lambda: self.call(self._loss_fn, batch))
            self._surveyed = True
        return torch.stack([self._one(batch, displacement) for displacement in displacements])

    def call(self, function: Callable[[nn.Module, Batch], Result], batch: Batch) -> Result:
        """``function(model, batch)`` as the losses are computed: evaluation mode, no gradients, the same autocast.

        Buffers that the forward writes are put back.
        """
        self._module.eval()
        with torch.no_grad(), self._autocast(), self._buffers.unchanged():
            return function(self._module, batch)

    def _one(self, batch: Batch, displacement: Displacement | None) -> Tensor:
        with self._perturber.displaced(displacement):
            losses = torch.as_tensor(self.call(self._loss_fn, batch))
        if losses.dim() > 1:
            raise ConfigError(
                f"loss_fn returned a tensor of shape {tuple(losses.shape)}",
                where="loss_fn",
                remedy="return one loss for each example, shape [n], or a scalar",
            )
        return losses.detach().reshape(-1).to("cpu", torch.float64)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self._autocast_dtype is None:
            yield
            return
        # The cache would keep a cast of perturbed weights beyond their module.
        with torch.autocast(self._device_type, dtype=self._autocast_dtype, cache_enabled=False):
            yield
