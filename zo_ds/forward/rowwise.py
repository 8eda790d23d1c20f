"""Losses whose rows do not depend on one another: generated text, for one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zo_ds.forward.evaluator import Batch, LossFunction


@dataclass(frozen=True)
class RowWise:
    """Marks a loss function that may be called once for several places, with the batch repeated for each of them.

    A loss function without this mark is called once for each place, and only what its calls of the model have in
    common is computed for all of them. Generation has little in common: what one place says is the next input of that
    place alone.

    Attributes:
        function: (model, batch) -> losses [rows]; the batch is a tree of tensors whose first axis is the rows.
    """

    function: LossFunction

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The losses of a batch."""
        return self.function(model, batch)
