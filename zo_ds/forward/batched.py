"""The batched evaluator: the batch is repeated for every place and flows once through the model.

The loss function is called once for each place, as if that place were alone. The first call of the model's backbone is
computed for all of them; those of the other places, which have the same inputs, are answered from it. Inputs that
depend on the weights are noticed, and such a call runs alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.forward.backbone import Backbone, find_backbone, outside_of
from zo_ds.forward.displacement import Place, run_of_one_seed
from zo_ds.forward.evaluator import Batch, Evaluator, LossFunction, Result
from zo_ds.forward.modules import Forward, own_parameters
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.forward.split import first_tensor, part, repeat, same
from zo_ds.forward.survey import hosts_of_lost_axes, largest_result
from zo_ds.forward.verify import Trace, compare

log = logging.getLogger("zo_ds")

STRICT_REPLICAS = 3
"""Places computed together in strict mode, whatever the memory: a fixed unit of work gives fixed bits."""
LIVE_TENSORS = 4
"""Activations alive at a time, in units of the largest: a gated MLP holds two, their product and the residual."""


@dataclass(frozen=True)
class PassSize:
    """How many places one pass computes.

    Attributes:
        replicas: a number, or None for as many as the budget holds.
        budget_bytes: of activations, for those beside the first place.
        strict: always `STRICT_REPLICAS`.
    """

    replicas: int | None = None
    budget_bytes: int = 2**30
    strict: bool = False

    def for_activations(self, largest_bytes: float) -> int:
        """Places at a time, where the largest activation of one place has so many bytes."""
        if self.strict:
            return STRICT_REPLICAS
        return self.replicas or max(1, int(self.budget_bytes / (LIVE_TENSORS * max(1.0, largest_bytes))))


@dataclass
class _Call:
    """A call of the backbone that was made for the places from ``first`` on."""

    inputs: Any
    first: int
    places: tuple[Place, ...]
    examples: int
    output: Any


class BatchedEvaluator(Evaluator):
    """Runs many places in one forward, see `Evaluator`.

    Args:
        module, perturber, loss_fn, autocast_dtype, device_type: see `Evaluator`.
        pass_size: how many places one pass computes.
        gathered: keeps parameters at hand within a context, however often their modules run.
    """

    def __init__(
        self,
        module: nn.Module,
        perturber: Perturber,
        loss_fn: LossFunction,
        autocast_dtype: torch.dtype | None,
        device_type: str = "cpu",
        *,
        pass_size: PassSize | None = None,
        gathered: Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        super().__init__(module, perturber, loss_fn, autocast_dtype, device_type)
        self._backbone = Backbone(find_backbone(module))
        self._pass_size, self._gathered = pass_size or PassSize(), gathered
        self._reference = SequentialEvaluator(module, perturber, loss_fn, autocast_dtype, device_type)
        self._bytes_per_input = 0.0
        self._joinable = self._verified = False
        self._calls: list[_Call] = []
        self._apart: set[int] = set()
        self._place_number = 0
        outside = dict.fromkeys(p for other in outside_of(self._backbone.module, module) for p in own_parameters(other))
        self._head = list(outside)
        self._holding, self._held = ExitStack(), False

    def losses(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        """See `Evaluator.losses`.

        Raises:
            ConfigError: on the first batch with a displacement, a layer's output differs from that of the sequential
                evaluator, or a layer cannot be run for several replicas.
        """
        if not any(places):
            return torch.stack([self._losses_here(batch)] * len(places))
        if self._verified:
            return self._losses(batch, places)
        self._learn(batch)
        return self._verify(batch, places) if self._joinable else self._losses(batch, places)

    def call(self, function: Callable[[nn.Module, Batch], Result], batch: Batch) -> Result:
        """See `Evaluator.call`; layers that the registry knows are computed as in the steps."""
        with self.perturber.displaced(None, leaves=True):
            return self._run(function, batch)

    def _losses(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        self._held = False
        try:
            with self._holding:
                return torch.stack([self._one(batch, places, number) for number in range(len(places))])
        finally:
            self._calls.clear()

    def _one(self, batch: Batch, places: Sequence[Place], number: int) -> Tensor:
        made = 0

        def answer(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal made
            made += 1
            return self._answer(original, (args, kwargs), places, number, made - 1)

        self._place_number = number
        with (
            self.perturber.displaced(places[number], leaves=True),
            self._backbone.answered_by(answer if self._joinable else None),
        ):
            return self._losses_here(batch)

    def _answer(self, original: Forward, inputs: Any, places: Sequence[Place], number: int, call: int) -> Any:
        """What call number ``call`` of the backbone gives at one place."""
        args, kwargs = inputs
        lead = first_tensor(inputs)
        known = self._calls[call] if call < len(self._calls) else None
        fits = lead is not None and (known is None or same(known.inputs, inputs))
        if fits and call not in self._apart and number == (0 if known is None else known.first + len(known.places)):
            # Let go of the old outputs before the new ones are made.
            self._calls[call:] = []
            known = self._joint(original, inputs, places, number)
            self._calls.append(known)
            if not self._held:
                # The head runs once for each place.
                self._holding.enter_context(self._gathered(self._head))
                self._held = True
        if fits and known is not None and 0 <= number - known.first < len(known.places):
            try:
                return part(known.output, number - known.first, len(known.places), known.examples)
            except ValueError as error:
                self._run_apart(call, str(error))
        elif not fits:
            self._run_apart(call, "its inputs depend on the weights")
        with self._backbone.answered_by(None):
            return original(*args, **kwargs)

    def _run_apart(self, call: int, why: str) -> None:
        if call not in self._apart:
            self._apart.add(call)
            log.warning("%s", f"call {call} of the model runs one direction at a time: {why}")

    def _joint(self, original: Forward, inputs: Any, places: Sequence[Place], first: int) -> _Call:
        lead = first_tensor(inputs)
        assert lead is not None
        examples = lead.shape[0]
        size = self._pass_size.for_activations(self._bytes_per_input * lead.numel())
        run = run_of_one_seed(places, first, size)
        args, kwargs = repeat(inputs, len(run), examples)
        if "use_cache" in kwargs and kwargs["use_cache"] is None:
            kwargs["use_cache"] = False
        with self._backbone.answered_by(None), self.perturber.together(run, examples, first):
            return _Call(inputs, first, run, examples, original(*args, **kwargs))

    def _learn(self, batch: Batch) -> None:
        """Look at one forward at theta: which layers cannot be joined, how large activations are."""

        def answer(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            lead = first_tensor((args, kwargs))
            with self._backbone.answered_by(None), ExitStack() as looking:
                if lead is None:
                    return original(*args, **kwargs)
                hosts = looking.enter_context(hosts_of_lost_axes(self._backbone.module, self.perturber.holders, lead))
                largest = looking.enter_context(largest_result())
                output = original(*args, **kwargs)
            self._joinable = None not in hosts
            for host, culprit in hosts.items():
                what = "the model" if host is None else f"each {type(host).__name__}"
                log.warning("%s", f"{what} runs one direction at a time: {culprit} in it loses the batch axis")
                if host is not None:
                    self.perturber.run_each(host)
            self._bytes_per_input = largest[0] / max(1, lead.numel())
            return output

        with self._backbone.answered_by(answer):
            self._reference.survey(batch)
        if self._joinable and self.perturber.uses_parameters(self._backbone.module):
            name = type(self._backbone.module).__name__
            log.warning("%s", f"the model runs one direction at a time: {name} itself uses trained parameters")
            self._joinable = False
        self._verified = not self._joinable

    def _verify(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        """The losses of a first batch, if those of some places are the sequential evaluator's."""
        displaced = [number for number, place in enumerate(places) if place is not None]
        numbers = sorted({0, displaced[0], displaced[-1]})
        with Trace(self.module, numbers, self.perturber, lambda: self._place_number) as batched:
            found = self._losses(batch, places)
        with Trace(self.module, numbers, self.perturber, lambda: self._place_number) as sequential:
            expected = []
            for self._place_number in numbers:
                expected.append(self._reference.losses(batch, [places[self._place_number]])[0])
        difference = compare(sequential, batched, exact=self.autocast_dtype is None)
        if difference is not None:
            raise ConfigError(
                f"layer '{difference.layer}' gives other values for several directions at once than for one",
                where="the first step, forward: batched",
                why=f"{difference.batched:.9g} batched, {difference.sequential:.9g} alone; mean losses "
                f"{float(found[difference.number].mean()):.9g} and "
                f"{float(expected[numbers.index(difference.number)].mean()):.9g}",
                remedy="set zeroth_order.forward to sequential, and report the model",
            )
        self._verified = True
        return found
