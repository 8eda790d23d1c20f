"""`lr: auto`: how far one step should go, measured before the first one. Nothing is written to the weights.

An estimate is made on one batch; its step is then tried at lengths a factor of 2 apart on another batch, from what the
rule expects, up while the loss falls, else down. The shortest good length, less what many steps need, is the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from zo_ds.config.schema import ZerothOrderConfig
from zo_ds.engine.measure import Measurement
from zo_ds.errors import ConfigError
from zo_ds.forward.displacement import Displacement, Shift
from zo_ds.forward.evaluator import Batch
from zo_ds.maths.estimators import probes, verdict
from zo_ds.maths.lr_rule import lr_of_run, single_step_move
from zo_ds.maths.noise import splitmix64, step_seed
from zo_ds.maths.update import Term, Update
from zo_ds.ops.plan import Plan

DIRECTIONS = 8
"""Directions that an estimate has at least: one alone may be nearly flat."""
FACTOR = 2.0
MOST_TRIALS = 7
ENOUGH = 0.8
"""Of the best fall of the loss: the shortest step that gives so much is taken."""
SHARE = 0.05
"""Of the run's forwards, what a range test may cost."""
_SALT = 0x6C725F72616E6765
"""Keeps its noise apart from that of the steps."""

Units = Callable[[int], tuple[Sequence[Batch], Batch | None]]
"""This rank's micro-batches of a batch, and one to spare; see `ZOEngine.step`."""


@dataclass(frozen=True)
class LrRange:
    """What a range test found, the same on every rank.

    Attributes:
        lr: for the run.
        best_single: learning rate of the shortest good single step.
        trials: (learning rate of a single step, mean loss of the other batch after it), in the order they were taken.
        loss: of that batch before.
        forwards: evaluations that it took.
    """

    lr: float
    best_single: float
    trials: tuple[tuple[float, float], ...]
    loss: float
    forwards: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the journal."""
        return {
            "value": self.lr,
            "how": "range",
            "best_single_step": self.best_single,
            "trials": [[lr, loss if math.isfinite(loss) else None] for lr, loss in self.trials],
            "loss_before": self.loss,
            "forwards": self.forwards,
        }


def affordable(config: ZerothOrderConfig, steps: int) -> bool:
    """Whether the longest range test is within `SHARE` of the run's forwards."""
    per_step = len(probes(config.estimator_spec))
    return _estimates(config) * per_step + 1 + MOST_TRIALS <= SHARE * steps * per_step


def find_lr(measurement: Measurement, config: ZerothOrderConfig, trained: int, steps: int, units: Units) -> LrRange:
    """Measure a learning rate; collective.

    Args:
        measurement: of losses, over all ranks.
        config: estimator, N and eps.
        trained: elements that are trained.
        steps: of the run.
        units: micro-batches of batch number 0 (estimate) and 1 (trials).

    Raises:
        ConfigError: no step lowers the loss, or a loss is not finite.
    """
    # The cap is for steps; at a learning rate of 1 coefficients of any size are right.
    run_seed, spec = splitmix64(config.run_seed ^ _SALT), replace(config.estimator_spec, coefficient_cap=math.inf)
    plan, terms = probes(spec), list[Term]()
    own, spare = units(0)
    for step in range(_estimates(config)):
        seed = step_seed(run_seed, step)
        places = [Displacement(seed, p.direction, p.side * config.eps) if p.side else None for p in plan]
        found = verdict(
            measurement.run(own, places, f"range test, estimate {step}", spare).means, spec, 1.0, config.eps
        )
        raw = found.coefficients if found.skip is None else torch.zeros(spec.num_directions)
        terms += [Term(step, i, float(c)) for i, c in enumerate(raw)]
    size = math.sqrt(sum(term.coefficient**2 for term in terms))
    if not size:
        raise _useless("no estimate has a direction: losses tie, or are not finite")
    other, spare = units(1)

    def loss_after(length: float) -> float:
        update = Update(0, tuple(Term(t.step, t.direction, t.coefficient * length) for t in terms))
        place = Shift(Plan.of(run_seed, [update])) if length else None
        return float(measurement.run(other, [place], f"range test, length {length:g}", spare).means[0])

    before = loss_after(0.0)
    trials = _search(loss_after, single_step_move(len(terms), trained) / size, before)
    least = min(loss if math.isfinite(loss) else math.inf for _, loss in trials)
    if not least < before:
        raise _useless(f"the loss was {before:.4f}, and {least:.4f} after the best step")
    # Near the best length the loss is flat, and a few examples cannot tell which side is the safe one.
    best = min(length for length, loss in trials if before - loss >= ENOUGH * (before - least))
    # The sum of k estimates goes k times as far along the gradient, and k times the directions bear k times the rate:
    # the best length of the sum is that of one estimate alone.
    forwards = _estimates(config) * len(plan) + 1 + len(trials)
    return LrRange(lr_of_run(best, steps), best, tuple(trials), before, forwards)


def _search(loss_after: Callable[[float], float], start: float, before: float) -> list[tuple[float, float]]:
    """(length, loss) from `start` up while the loss falls; else down until it is less than before, and while it falls.

    Far beyond the best length losses are all alike, or not finite: there, a fall is worth nothing.
    """
    trials = [(start, loss_after(start)), (start * FACTOR, loss_after(start * FACTOR))]
    up = trials[0][1] > trials[1][1] < before
    factor, (at, last) = (FACTOR, trials[1]) if up else (1 / FACTOR, trials[0])
    while len(trials) < MOST_TRIALS:
        at *= factor
        trials.append((at, loss_after(at)))
        if last < before and not trials[-1][1] < last:
            break
        last = trials[-1][1]
    return trials


def _estimates(config: ZerothOrderConfig) -> int:
    return -(-DIRECTIONS // config.num_directions)


def _useless(why: str) -> ConfigError:
    return ConfigError(
        "the range test found no learning rate",
        where="zeroth_order.lr = auto",
        why=why,
        remedy="set zeroth_order.lr to a number or to rule, or eps or the batch to something larger",
    )
