"""Calls of a model's backbone, made once for many places and handed out to each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_structure

from zo_ds.errors import of_a_collective
from zo_ds.forward.backbone import Backbone
from zo_ds.forward.displacement import Place, run_of_one_seed
from zo_ds.forward.modules import Forward
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.replicas import LostAxisError, Together
from zo_ds.forward.split import first_tensor, is_plain, kept, part, repeat, same, with_batch_axis, without_caches

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
        budget_bytes: of activations.
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
    """A call of the backbone that was made for some places."""

    inputs: Any
    places: Together
    output: Any
    notes: Any

    def has(self, number: int) -> bool:
        return 0 <= number - self.places.first < self.places.count

    def part(self, number: int) -> Any:
        return part(self.output, number - self.places.first, self.places.count, self.places.examples)


class Joiner:
    """Answers the backbone's calls while a loss function runs for one place after the other.

    Args:
        backbone: whose calls.
        perturber: displaces its layers.
        pass_size: how many places one pass computes.
        made: called after places have been computed together; may return notes on that.
        served: called with the number of a place that was answered, and those notes.

    Attributes:
        bytes_per_input: of the largest activation, for each element of the first input.
    """

    def __init__(
        self,
        backbone: Backbone,
        perturber: Perturber,
        pass_size: PassSize,
        made: Callable[[], Any],
        served: Callable[[int, Any], None],
    ) -> None:
        self.backbone, self.bytes_per_input = backbone, 0.0
        self._perturber, self._pass_size, self._made, self._served = perturber, pass_size, made, served
        self._calls: dict[int, _Call] = {}
        self._begun = 0
        self._apart: set[int] = set()
        self._axes: dict[Any, list[bool]] = {}

    def clear(self) -> None:
        """Let go of all outputs."""
        self._calls.clear()
        self._begun = 0

    def batched(self, inputs: Any) -> list[bool]:
        """For each leaf of the backbone's inputs, whether it has the batch axis.

        The first time tells a mask [tokens, tokens] from a batch of as many examples later on.
        """
        lead = first_tensor(inputs)
        looks = with_batch_axis(inputs, -1 if lead is None else lead.shape[0])
        known = self._axes.setdefault(tree_structure(inputs), looks)
        return [old and new for old, new in zip(known, looks, strict=True)]

    def answer(self, original: Forward, inputs: Any, places: Sequence[Place], number: int, call: int) -> Any:
        """What a call of the backbone gives at one place.

        Args:
            original: the backbone's forward.
            inputs: (args, kwargs).
            places: all of the step.
            number: of the place whose loss is being computed.
            call: how many calls it made before.
        """
        known = self._calls.get(call)
        objection = ""
        if call not in self._apart:
            begins = number == (self._begun if known is None else known.places.first + known.places.count)
            if not is_plain(inputs) or first_tensor(inputs) is None:
                objection = "its inputs hold more than tensors"
            elif known is not None and not same(known.inputs, inputs):
                objection = "its inputs depend on the weights"
            elif begins:
                known, objection = self._make(original, inputs, places, number, call)
            if not objection and known is not None and known.has(number):
                self._served(number, known.notes)
                return known.part(number)
        args, kwargs = inputs
        with self.backbone.answered_by(None):
            output = original(*args, **kwargs)
        if objection:
            # Not before: where the inputs are to blame, the call has failed alone as well.
            self._run_apart(call, objection)
        return output

    def _make(
        self, original: Forward, inputs: Any, places: Sequence[Place], number: int, call: int
    ) -> tuple[_Call | None, str]:
        """The call for this place and those after it; or None, and why it cannot be made."""
        # Let go of old outputs before new ones are made. Later calls of this place begin a pass here, too.
        self._calls = {at: old for at, old in self._calls.items() if at != call and old.has(number)}
        self._begun = number
        try:
            made = self._joint(original, inputs, places, number)
            made.part(number)
        except (LostAxisError, ValueError, RuntimeError, TypeError, IndexError) as error:
            if of_a_collective(error):
                raise
            return None, str(error).splitlines()[0] if str(error) else type(error).__name__
        self._calls[call] = made
        return made, ""

    def _joint(self, original: Forward, inputs: Any, places: Sequence[Place], first: int) -> _Call:
        lead = first_tensor(inputs)
        assert lead is not None
        size = self._pass_size.for_activations(self.bytes_per_input * lead.numel())
        places_at_once = run_of_one_seed(places, first, size)
        together = Together(places_at_once, lead.shape[0], self.backbone.tokens(lead), first)
        compared = kept(inputs)
        args, kwargs = repeat(inputs, together.count, self.batched(inputs))
        backbone, asked = self.backbone, kwargs.get("use_cache")
        if asked is None and ("use_cache" in kwargs or (backbone.brings_cache and backbone.takes_use_cache)):
            # Nobody asked for a cache; it would hold the keys and values of every place.
            kwargs["use_cache"] = False
        with backbone.answered_by(None), self._perturber.together(together):
            output = original(*args, **kwargs)
        if backbone.brings_cache and not asked:
            output = without_caches(output)
        return _Call(compared, together, output, self._made())

    def _run_apart(self, call: int, why: str) -> None:
        self._apart.add(call)
        which = "the model runs" if call == 0 else f"call {call + 1} of the model runs"
        log.warning("%s", f"{which} one direction at a time: {why}")
