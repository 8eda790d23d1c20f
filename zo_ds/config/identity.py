"""Which settings decide the weights of a run: those may not change when it goes on, unless by a fork."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from zo_ds.config.schema import ZOConfig

FREE = (
    "name",
    "resume",
    "model.path",
    "model.gguf",
    "peft.path",
    "data.path",
    "data.subset",
    "data.revision",
    "data.dev_examples",
    "data.test_examples",
    "zeroth_order.max_consecutive_skips",
    "training.steps",
    "training.eval_every",
    "training.best_by",
    "training.patience",
    "training.eval_batch_size",
    "first_order",
    "in_context",
    "task.calibrated",
    "parallel",
    "journal",
    "output",
)
"""Keys and sections that may change: they only say where, how long, or how it is watched. (The model and the training
examples themselves are compared by digest, so their folders may move.)"""
FREE_OF_RESULT = ("name", "resume", "parallel", "journal", "output")
"""The same of a run that is over and has no journal: another length or optimizer gives another result."""
ROUNDING = (
    "deepspeed",
    "training.micro_batch_size",
    "zeroth_order.forward",
    "zeroth_order.replicas_per_pass",
    "zeroth_order.activation_budget_mib",
    "zeroth_order.strict",
)
"""Keys that change losses by rounding only: the run goes on, but not necessarily with the same last bits."""


class Difference(NamedTuple):
    """A setting that is not what it was."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """As shown to the user."""
        return f"{self.key}: {self.old} -> {self.new}"


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...] = FREE
) -> tuple[list[Difference], list[Difference]]:
    """What changed between two resolved recipes (plain data).

    Args:
        old: of the run that is there.
        new: what is asked for.
        free: keys and sections that may change.

    Returns:
        (changes of the mathematics, changes that only affect rounding).
    """
    before, after = {**_defaults(), **_flat(old)}, {**_defaults(), **_flat(new)}
    if not (_decays(before) or _decays(after)):
        before.pop("zeroth_order.total_steps", None)
        after.pop("zeroth_order.total_steps", None)
    changed = [
        Difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _in(key, free)
    ]
    return [d for d in changed if not _in(d.key, ROUNDING)], [d for d in changed if _in(d.key, ROUNDING)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}.")
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def _defaults() -> dict[str, Any]:
    """What a key means that a recipe of an older version does not have."""
    least = {"model": {"path": ""}, "data": {"path": ""}, "training": {"steps": 1}}
    return _flat(ZOConfig.model_validate(least).model_dump(mode="json"))


def _in(key: str, group: tuple[str, ...]) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in group)


def _decays(flat: Mapping[str, Any]) -> bool:
    schedules = (flat.get("zeroth_order.lr_schedule"), flat.get("zeroth_order.eps_schedule"))
    return any(schedule not in (None, "constant") for schedule in schedules)
