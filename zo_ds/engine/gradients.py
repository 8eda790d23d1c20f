"""The loss of a unit of work with its gradient, and the optimizers that take gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.config.schema import FirstOrderConfig
from zo_ds.errors import ConfigError
from zo_ds.forward.evaluator import Batch
from zo_ds.forward.sequential import SequentialEvaluator


class Differentiator(SequentialEvaluator):
    """Losses at theta as every evaluator gives them, and their gradient too.

    The model is in evaluation mode for the gradient as well: without dropout, first-order and zeroth-order runs
    minimise the same function.
    """

    def gradient(self, batch: Batch, share: float, backward: Callable[[Tensor], Any]) -> Tensor:
        """Let gradients of one unit of work be added to those of the parameters.

        Args:
            batch: whatever the loss function takes.
            share: what the mean loss over the examples is multiplied by.
            backward: does it, given the scalar.

        Returns:
            fp64 [examples] on the CPU, the losses.

        Raises:
            ConfigError: the loss function returned neither a scalar nor a vector, or nothing that has a gradient.
        """
        self.module.eval()
        with self._buffers.unchanged(), torch.enable_grad():
            with self._autocast():
                losses = self.loss_fn(self.module, batch)
            if not isinstance(losses, Tensor) or losses.dim() > 1 or not losses.requires_grad:
                raise ConfigError(
                    "the loss has no gradient",
                    where="loss_fn",
                    why="a first-order run needs one differentiable loss for each example, shape [n], or a scalar",
                    remedy="use method: zeroth_order, which needs no gradients, or another objective",
                )
            backward(losses.float().mean() * share)
        return losses.detach().reshape(-1).to("cpu", torch.float64)


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weights shrink by lr * ``decay`` of their group before a step, apart from gradient and momentum."""

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        with torch.no_grad():
            for group in self.param_groups:
                if group["decay"]:
                    for parameter in group["params"]:
                        parameter.mul_(1.0 - group["lr"] * group["decay"])
        return super().step(closure)


def make_optimizer(config: FirstOrderConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a first-order run; like a zeroth-order step it decays matrices only.

    Fused kernels, since the others make copies of the gradients' size.

    Args:
        config: which one, and its constants.
        parameters: what is trained, where it will stay.
    """
    everything = list(parameters)
    matrices = [parameter for parameter in everything if parameter.dim() >= 2]
    vectors = [parameter for parameter in everything if parameter.dim() < 2]
    decays = [(group, decay) for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group]
    if config.optimizer == "sgd":
        groups = [{"params": group, "decay": decay} for group, decay in decays]
        return DecoupledSGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    groups = [{"params": group, "weight_decay": decay} for group, decay in decays]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
