"""What every evaluator does alike: from a loss function to losses under displacements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.forward.buffers import BufferGuard
from zo_ds.forward.displacement import Anywhere
from zo_ds.forward.perturber import Perturber

Batch = Any
Result = TypeVar("Result")
LossFunction = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> per-example losses [n], or one scalar. It need not be differentiable."""


class Evaluator(ABC):
    """Evaluates per-example losses at theta or at a displaced theta.

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
        self.module, self.perturber, self.loss_fn = module, perturber, loss_fn
        self.autocast_dtype, self.device_type = autocast_dtype, device_type
        self._buffers = BufferGuard(module)

    @abstractmethod
    def losses(self, batch: Batch, places: Sequence[Anywhere]) -> Tensor:
        """Losses of one unit of work at each place.

        Args:
            batch: whatever the loss function takes.
            places: None stands for theta itself.

        Returns:
            fp64 [places, examples] on the CPU.

        Raises:
            ConfigError: the loss function returned neither a scalar nor a vector.
        """

    def call(self, function: Callable[[nn.Module, Batch], Result], batch: Batch) -> Result:
        """``function(model, batch)`` at theta, as the losses are computed: evaluation mode, no gradients, autocast.

        Buffers that the forward writes are put back.
        """
        return self._run(function, batch)

    def _run(self, function: Callable[[nn.Module, Batch], Result], batch: Batch) -> Result:
        self.module.eval()
        with torch.inference_mode(), _plain_attention(), self._autocast(), self._buffers.unchanged():
            return function(self.module, batch)

    def _losses_here(self, batch: Batch) -> Tensor:
        """What the loss function gives at what the model sees now, fp64 [examples]."""
        losses = torch.as_tensor(self._run(self.loss_fn, batch))
        if losses.dim() > 1:
            raise ConfigError(
                f"loss_fn returned a tensor of shape {tuple(losses.shape)}",
                where="loss_fn",
                remedy="return one loss for each example, shape [n], or a scalar",
            )
        return losses.detach().reshape(-1).to("cpu", torch.float64, copy=True)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.autocast_dtype is None:
            yield
            return
        # The cache would keep a cast of perturbed weights beyond their module.
        with torch.autocast(self.device_type, dtype=self.autocast_dtype, cache_enabled=False):
            yield


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fused encoder layers, which read the weights of modules that they do not call."""
    backend: Any = torch.backends.mha
    before = backend.get_fastpath_enabled()
    backend.set_fastpath_enabled(False)
    try:
        yield
    finally:
        backend.set_fastpath_enabled(before)
