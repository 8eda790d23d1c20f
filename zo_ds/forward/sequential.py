"""The sequential evaluator: the model's own code, one forward for each place, correct for any module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_ds.forward.displacement import Anywhere
from zo_ds.forward.evaluator import Batch, Evaluator


class SequentialEvaluator(Evaluator):
    """Runs the model once for each place, see `Evaluator`."""

    _surveyed = False

    def losses(self, batch: Batch, places: Sequence[Anywhere]) -> Tensor:
        """See `Evaluator.losses`."""
        if not self._surveyed:
            self.survey(batch)
        return torch.stack([self._one(batch, place) for place in places])

    def survey(self, batch: Batch) -> None:
        """Run the model once at theta, to learn how it uses its parameters."""
        self.perturber.survey(lambda: self._run(self.loss_fn, batch))
        self._surveyed = True

    def _one(self, batch: Batch, place: Anywhere) -> Tensor:
        with self.perturber.displaced(place):
            return self._losses_here(batch)
