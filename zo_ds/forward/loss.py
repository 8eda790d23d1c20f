"""What is minimised if the user says nothing: the model's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from zo_ds.errors import ConfigError
from zo_ds.forward.backbone import find_head, without_adapters
from zo_ds.forward.evaluator import Batch
from zo_ds.forward.head import logits_at

IGNORED = -100
"""Label of a position without a target, in transformers."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own ``.loss``, a scalar.

    That of a causal LM of transformers is computed here, from the labelled positions alone: the mean cross-entropy of
    the next token in fp32.

    Raises:
        ConfigError: the model returned none (a batch without labels, most often).
    """
    if _is_next_token_loss(model, batch):
        return _next_token_loss(model, batch)
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


def _is_next_token_loss(model: nn.Module, batch: Batch) -> bool:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        return False
    ids, labels = batch["input_ids"], batch["labels"]
    inner: Any = without_adapters(model)
    named = getattr(getattr(inner, "loss_function", None), "__name__", "")
    plain = not {"num_items_in_batch", "shift_labels", "logits_to_keep"} & batch.keys()
    router = getattr(getattr(inner, "config", None), "output_router_logits", False)
    return bool(
        plain
        and named == "ForCausalLMLoss"
        and ids.dim() == 2
        and labels.shape == ids.shape
        and not router
        and find_head(model) is not None
    )


def _next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = batch["labels"][:, 1:]
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    logits = logits_at(model, inputs, rows, columns)
    return F.cross_entropy(logits.float(), targets[rows, columns])
