"""What an update op needs to know beside the weights: terms and roundings of one step or of a whole history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zo_ds.maths.noise import step_seed
from zo_ds.maths.update import Update


@dataclass(frozen=True)
class Plan:
    """Updates in order, as flat CPU tensors. 64-bit seeds are held as int64, bit for bit.

    Attributes:
        term_counts: int64 [K], how many terms each update has.
        shrinks: fp32 [K], what decaying weights are multiplied by first.
        rounding_seeds: int64 [K].
        seeds: int64 [T], the terms of all updates one after the other.
        directions: int64 [T].
        coefficients: fp32 [T].
    """

    term_counts: Tensor
    shrinks: Tensor
    rounding_seeds: Tensor
    seeds: Tensor
    directions: Tensor
    coefficients: Tensor

    @classmethod
    def of(cls, run_seed: int, updates: Sequence[Update]) -> Plan:
        """The plan of a run's updates."""
        terms = [term for update in updates for term in update.terms]
        of_step = {step: signed(step_seed(run_seed, step)) for step in {t.step for t in terms}}
        return cls(
            torch.tensor([len(update.terms) for update in updates], dtype=torch.int64),
            torch.tensor([update.shrink for update in updates], dtype=torch.float32),
            torch.tensor([signed(step_seed(run_seed, update.step)) for update in updates], dtype=torch.int64),
            torch.tensor([of_step[term.step] for term in terms], dtype=torch.int64),
            torch.tensor([term.direction for term in terms], dtype=torch.int64),
            torch.tensor([term.coefficient for term in terms], dtype=torch.float32),
        )

    @classmethod
    def joined(cls, plans: Sequence[Plan]) -> Plan:
        """All updates of some plans, in order."""
        parts = zip(*[[getattr(plan, entry.name) for entry in fields(cls)] for plan in plans], strict=True)
        return plans[0] if len(plans) == 1 else cls(*[torch.cat(part) for part in parts])


def signed(seed: int) -> int:
    """A 64-bit seed as the int64 with the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
