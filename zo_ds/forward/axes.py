"""Which inputs of which modules have the batch axis, found by running a model on its inputs once and doubled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Axis(Enum):
    """What the first axis of a tensor counts."""

    EXAMPLES = "examples"
    TOKENS = "tokens"
    """All tokens of all examples, in order: activations flattened to rows."""
    NONE = "none"
    """The same however many examples there are: positions, masks, rotary tables."""
    OTHER = "other"


BATCHED = (Axis.EXAMPLES, Axis.TOKENS)
Axes = tuple[Axis, ...]
"""Of each tensor among a call's inputs, in the order of `tensors_of`."""


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors with axes among a call's inputs."""
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    callers: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    floating: tuple[bool, ...]


@contextmanager
def calls_of(backbone: nn.Module) -> Iterator[list[_Call]]:
    """Within this context, note every call of a module below the backbone."""
    calls: list[_Call] = []
    running: list[int] = []

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = tensors_of((args, kwargs))
        shapes, floating = tuple(t.shape for t in tensors), tuple(t.is_floating_point() for t in tensors)
        calls.append(_Call(name, module, tuple(running), shapes, floating))
        running.append(len(calls) - 1)

    hooks = [
        hook
        for name, child in backbone.named_modules()
        if child is not backbone
        for hook in (
            child.register_forward_pre_hook(partial(enter, name), with_kwargs=True, prepend=True),
            child.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True),
        )
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Found:
    """What two runs tell.

    Attributes:
        axes: by module; that of its last call.
        hosts: modules to run once for each replica, with the name of the layer within that has no batch axis; None
            stands for the backbone itself.
    """

    axes: dict[nn.Module, Axes]
    hosts: dict[nn.Module | None, str]


def find_axes(
    once: Sequence[_Call], doubled: Sequence[_Call], holders: Mapping[nn.Module, bool], examples: int, tokens: int
) -> Found:
    """Compare the calls of a run with those of one on twice the examples.

    Args:
        once: from `calls_of`.
        doubled: likewise, on every example twice.
        holders: modules with parameters, which must be able to tell replicas apart; and whether the registry of leaves
            computes them, which takes positions for embeddings that are given once for all examples.
        examples: first axis of the backbone's inputs in the first run.
        tokens: of each example.
    """
    if [call.name for call in once] != [call.name for call in doubled]:
        return Found({}, {None: "what runs depends on the number of examples; a layer"})
    found: dict[nn.Module, Axes] = {}
    hosts: dict[nn.Module | None, str] = {}
    kinds = [
        tuple(_axis(a, b, examples, tokens) for a, b in zip(one.shapes, two.shapes, strict=False))
        for one, two in zip(once, doubled, strict=True)
    ]
    whole = [
        _is_whole(call, axes, positions=isinstance(call.module, nn.Embedding) and holders.get(call.module, False))
        for call, axes in zip(once, kinds, strict=True)
    ]
    for call, axes, good in zip(once, kinds, whole, strict=True):
        # A module that is called in two ways has no axes to rely on.
        lost = not good or found.get(call.module, axes) != axes
        found[call.module] = axes
        if call.module in holders and lost:
            host = next((once[i].module for i in reversed(call.callers) if whole[i] and any(once[i].floating)), None)
            hosts.setdefault(host, call.name)
    return Found(found, hosts)


def _axis(one: torch.Size, two: torch.Size, examples: int, tokens: int) -> Axis:
    if one[0] == two[0]:
        return Axis.NONE
    if two[0] == 2 * one[0] and one[0] in (examples, examples * tokens):
        return Axis.EXAMPLES if one[0] == examples else Axis.TOKENS
    return Axis.OTHER


def _is_whole(call: _Call, axes: Axes, *, positions: bool) -> bool:
    """Whether all that a call is about has the batch axis."""
    activations = [axis for axis, floating in zip(axes, call.floating, strict=False) if floating]
    if activations:
        return activations[0] in BATCHED
    return bool(axes) and (axes[0] in BATCHED or (axes[0] is Axis.NONE and positions))
