"""The batched evaluator: the batch is repeated for every place and flows once through the model.

The loss function is called once for each place, as if that place were alone. The first call of the model's backbone is
computed for all of them; those of the other places, which have the same inputs, are answered from it. Inputs that
depend on the weights are noticed, and such a call runs alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError, of_a_collective
from zo_ds.forward.axes import calls_of, find_axes
from zo_ds.forward.backbone import Answer, Backbone, find_backbone, outside_of
from zo_ds.forward.displacement import Anywhere, Place, Shift, run_of_one_seed
from zo_ds.forward.evaluator import Batch, Evaluator, Result
from zo_ds.forward.joining import Joiner, PassSize
from zo_ds.forward.memory import give_back
from zo_ds.forward.modules import Forward, own_parameters
from zo_ds.forward.replicas import LostAxisError, Together
from zo_ds.forward.rowwise import RowWise
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.forward.soft_prompts import stand_in_prompts
from zo_ds.forward.split import first_tensor, is_plain, repeat, with_batch_axis
from zo_ds.forward.survey import largest_result
from zo_ds.forward.verify import Difference, JointSamples, Trace, compare, losses_differ

log = logging.getLogger("zo_ds")

ROWS_ALIKE = 0.5
"""Least share of generated answers that must be worth the same in a batched and in a sequential forward."""


class BatchedEvaluator(Evaluator):
    """Runs many places in one forward, see `Evaluator`.

    Args:
        reference: evaluates the same loss of the same model; the first batch is held against it.
        pass_size: how many places one pass computes.
        gathered: keeps parameters at hand within a context, however often their modules run.
    """

    def __init__(
        self,
        reference: SequentialEvaluator,
        *,
        pass_size: PassSize | None = None,
        gathered: Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        module, perturber = reference.module, reference.perturber
        super().__init__(module, perturber, reference.loss_fn, reference.autocast_dtype, reference.device_type)
        self._reference = reference
        backbone = Backbone(find_backbone(module))
        self._pass_size = pass_size or PassSize()
        self._joiner = Joiner(backbone, perturber, self._pass_size, self._made, self._served)
        self._gathered, self._holding, self._head = gathered, ExitStack(), list[nn.Parameter]()
        self._head_is_held = False
        self._prompts = stand_in_prompts(module, perturber)
        self._joinable = self._learned = self._verified = False
        self._trace: Trace | None = None
        self._place_number = 0

    def losses(self, batch: Batch, places: Sequence[Anywhere]) -> Tensor:
        """See `Evaluator.losses`. After an update that was not made, the model runs alone.

        Raises:
            ConfigError: on the first batch with a displacement, the sequential evaluator finds other losses.
        """
        displaced = [place for place in places if not isinstance(place, Shift)]
        if len(displaced) < len(places):
            return self._reference.losses(batch, places)
        return self._at(batch, displaced)

    def _at(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        if not any(places):
            return torch.stack([self._losses_here(batch)] * len(places))
        if not self._learned:
            self._learn(batch)
        if isinstance(self.loss_fn, RowWise):
            return self._row_wise(batch, places)
        return self._losses(batch, places) if self._verified else self._verify(batch, places)

    def call(self, function: Callable[[nn.Module, Batch], Result], batch: Batch) -> Result:
        """See `Evaluator.call`; layers that the registry knows are computed as in the steps."""
        with self.perturber.displaced(None, leaves=True):
            return self._run(function, batch)

    def _losses(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        try:
            with self._holding:
                return torch.stack([self._one(batch, places, number) for number in range(len(places))])
        finally:
            self._joiner.clear()
            self._head_is_held = False

    def _row_wise(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        """The loss function once for as many places as a pass computes, with the batch repeated for each."""
        lead = first_tensor(batch)
        if lead is None or not self._joinable:
            return self._reference.losses(batch, places)
        rows, tokens = lead.shape[0], lead.shape[1] if lead.dim() > 1 else 1
        size = self._pass_size.for_activations(self._joiner.bytes_per_input * lead.numel())
        found = list[Tensor]()
        while len(found) < len(places):
            together = Together(run_of_one_seed(places, len(found), size), rows, tokens, len(found))
            repeated = repeat(batch, together.count, with_batch_axis(batch, rows))
            try:
                with self._joiner.backbone.answered_by(self._for(together)), self.perturber.together(together):
                    found += self._losses_here(repeated).view(together.count, rows).unbind()
            except (LostAxisError, ValueError, RuntimeError, TypeError, IndexError) as error:
                if of_a_collective(error):
                    raise
                # If the loss function is to blame, it fails alone as well.
                log.warning("%s", f"the model runs one direction at a time: {str(error).split(chr(10))[0]}")
                self._joinable = False
                return self._reference.losses(batch, places)
        losses = torch.stack(found)
        if not self._verified:
            self._verify_rows(batch, places, losses)
        return losses

    def _for(self, together: Together) -> Answer:
        """Calls for many places with as many tokens as each of them has: those behind a cache bring one."""

        def answer(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            backbone, lead = self._joiner.backbone, first_tensor((args, kwargs))
            own = together if lead is None else replace(together, tokens=backbone.tokens(lead))
            with backbone.answered_by(None), self.perturber.together(own):
                return original(*args, **kwargs)

        return answer

    def _verify_rows(self, batch: Batch, places: Sequence[Place], found: Tensor) -> None:
        """Hold some places against the sequential evaluator.

        What is said may turn on the last bit of two logits, so that a row may differ; most of them do not.
        """
        numbers = sorted({0, len(places) // 2, len(places) - 1})
        expected = self._reference.losses(batch, [places[number] for number in numbers])
        same = expected == found[numbers]
        if float(same.double().mean()) < ROWS_ALIKE:
            self._refuse(None, numbers, list(expected), found)
        self._verified = True
        self.perturber.forget_copies()
        give_back()

    def _one(self, batch: Batch, places: Sequence[Place], number: int) -> Tensor:
        made = 0

        def answer(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal made
            made += 1
            return self._joiner.answer(original, (args, kwargs), places, number, made - 1)

        self._place_number = number
        with (
            self.perturber.displaced(places[number], leaves=True),
            self._joiner.backbone.answered_by(answer if self._joinable else None),
        ):
            return self._losses_here(batch)

    def _made(self) -> JointSamples:
        if not self._head_is_held:
            # It runs once for each place from now on.
            self._holding.enter_context(self._gathered(self._head))
            self._head_is_held = True
        return {} if self._trace is None else self._trace.take_joint()

    def _served(self, number: int, samples: JointSamples) -> None:
        if self._trace is not None:
            self._trace.serve(number, samples)

    def _learn(self, batch: Batch) -> None:
        """Look at forwards at theta: how the model uses its parameters, and which inputs have the batch axis."""
        self._find_what_runs(batch)
        backbone = self._joiner.backbone
        hosts: dict[nn.Module | None, str] = {None: f"{type(backbone.module).__name__} was not called; nothing"}
        tried = False

        def answer(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal tried
            with backbone.answered_by(None):
                if tried and isinstance(self.loss_fn, RowWise):
                    # Later calls go on from a cache; what holds for the first holds for them.
                    return original(*args, **kwargs)
                tried = True
                output, found = self._try(original, (args, kwargs))
            if found is not None:
                hosts.clear()
                hosts.update(found)
            return output

        with backbone.answered_by(answer):
            self._losses_here(batch)
        if self.perturber.uses_parameters(backbone.module):
            hosts[None] = f"{type(backbone.module).__name__} itself uses trained parameters; that"
        self._joinable = None not in hosts
        for host, culprit in hosts.items():
            what = "the model" if host is None else f"each {type(host).__name__}"
            log.warning("%s", f"{what} runs one direction at a time: {culprit} in it has no batch axis")
            if host is not None:
                self.perturber.run_each(host)
        self._head = list(
            dict.fromkeys(p for other in outside_of(backbone.module, self.module) for p in own_parameters(other))
        )
        self._learned = True

    def _find_what_runs(self, batch: Batch) -> None:
        """Survey the model; and if it goes past its backbone to a module below, take that one."""
        backbone, called = self._joiner.backbone, False

        def answer(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal called
            called = True
            return original(*args, **kwargs)

        with calls_of(backbone.module) as calls, backbone.answered_by(answer):
            self._reference.survey(batch)
        outermost = list(dict.fromkeys(call.module for call in calls if not call.callers))
        if not called and len(outermost) == 1:
            # OPT's head calls the decoder within its backbone.
            self._joiner.backbone = Backbone(outermost[0])

    def _try(self, original: Forward, inputs: Any) -> tuple[Any, dict[nn.Module | None, str] | None]:
        """One call of the backbone, and what stands against joining such calls."""
        (args, kwargs), lead = inputs, first_tensor(inputs)
        if lead is None or not is_plain(inputs):
            return original(*args, **kwargs), {None: "the inputs hold more than tensors; something"}
        batched, module = self._joiner.batched(inputs), self._joiner.backbone.module
        again, more = repeat(inputs, 2, batched)
        with calls_of(module) as once, largest_result() as largest:
            output = original(*args, **kwargs)
        self._joiner.bytes_per_input = largest[0] / max(1, lead.numel())
        try:
            with calls_of(module) as doubled:
                original(*again, **more)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if of_a_collective(error):
                raise
            return output, {None: f"twice the examples fail ({str(error).splitlines()[0]}); something"}
        holders = {holder: known for holder, known in self.perturber.holders.items() if holder not in self._prompts}
        found = find_axes(once, doubled, holders, lead.shape[0], self._joiner.backbone.tokens(lead))
        self.perturber.know(found.axes)
        return output, found.hosts

    def _verify(self, batch: Batch, places: Sequence[Place]) -> Tensor:
        """The losses of a first batch, if those of some places are the sequential evaluator's."""
        # Wherever a rank's clean place is: those of a shard group must run as many forwards.
        numbers = sorted({0, len(places) // 2, len(places) - 1})
        if not any(places[number] for number in numbers):
            numbers = [next(number for number, place in enumerate(places) if place is not None)]
        with Trace(self.module, numbers, self.perturber, lambda: self._place_number) as batched:
            self._trace = batched
            try:
                found = self._losses(batch, places)
            finally:
                self._trace = None
        with Trace(self.module, numbers, self.perturber, lambda: self._place_number) as sequential:
            expected = []
            for self._place_number in numbers:
                expected.append(self._reference.losses(batch, [places[self._place_number]])[0])
        exact = self.autocast_dtype is None
        wrong = losses_differ(expected, [found[number] for number in numbers], exact=exact)
        # Rounding to 16 bits may send a token to another expert: what counts there is the loss.
        difference = compare(sequential, batched, exact=exact) if exact or wrong else None
        if wrong or difference is not None:
            self._refuse(difference, numbers, expected, found)
        self._verified = True
        # The sequential evaluator has shown whole parameters, the head's too.
        self.perturber.forget_copies()
        give_back()
        return found

    def _refuse(
        self, difference: Difference | None, numbers: Sequence[int], expected: Sequence[Tensor], found: Tensor
    ) -> None:
        means = ", ".join(
            f"{float(found[number].mean()):.9g} for {float(wanted.mean()):.9g}"
            for number, wanted in zip(numbers, expected, strict=True)
        )
        what = "the loss function"
        if difference is not None:
            # The root has no name.
            what = f"layer '{difference.layer}'" if difference.layer else f"the {type(self.module).__name__} itself"
        values = "" if difference is None else f"{difference.batched} batched, {difference.sequential} alone; "
        raise ConfigError(
            f"{what} gives other values for several directions at once than for one",
            where="the first step, forward: batched",
            why=f"{values}mean losses {means}",
            remedy="set zeroth_order.forward to sequential, and report the model",
        )
