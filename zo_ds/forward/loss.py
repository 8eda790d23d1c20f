"""What is minimised if the user says nothing: the model's own loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.forward.evaluator import Batch


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
