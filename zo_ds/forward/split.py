"""Inputs and outputs of many replicas: put behind one another along the first axis, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


def first_tensor(inputs: Any) -> Tensor | None:
    """The first tensor with axes among a call's inputs; what its first axis counts are the examples."""
    return next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)


def repeat(inputs: Any, replicas: int, examples: int) -> Any:
    """Every tensor that has the batch axis, so many times; a batch of one costs no memory."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != examples:
            return leaf
        if examples == 1:
            return leaf.expand(replicas, *leaf.shape[1:])
        return leaf.repeat(replicas, *[1] * (leaf.dim() - 1))

    return tree_map(one, inputs)


def split(inputs: Any, replicas: int, examples: int) -> list[Any]:
    """A call's inputs for each replica: parts of tensors whose first axis is replica-major, all else as it is.

    Raises:
        ValueError: activations come first and have no such axis.
    """
    leaves, spec = tree_flatten(inputs)
    first = next((t for t in leaves if isinstance(t, Tensor) and t.dim() and t.is_floating_point()), None)
    lead = replicas * examples
    if first is not None and first.shape[0] % lead and first.shape[0] != 1:
        raise ValueError(f"an input of shape {tuple(first.shape)} has no batch axis")
    leads = {lead} if first is None or first.shape[0] == 1 else {lead, first.shape[0]}
    parts: list[list[Any]] = [[] for _ in range(replicas)]
    for leaf in leaves:
        divided = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] in leads
        pieces = leaf.chunk(replicas) if divided else [leaf] * replicas
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [tree_unflatten(part, spec) for part in parts]


def join(outputs: Sequence[Any], examples: int) -> Any:
    """What a batched call would have given, from the outputs of each replica's own call."""
    flat = [tree_flatten(output) for output in outputs]
    joined: list[Any] = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(column[0], Tensor) or column[0].dim() == 0:
            joined.append(column[0])
        elif column[0].shape[0] % examples == 0:
            joined.append(torch.cat(column))
        else:
            # Made without looking at the batch (positions): the same for all of a replica's examples.
            rows = [part if part.shape[0] == 1 else part.unsqueeze(0) for part in column]
            joined.append(torch.cat([row.expand(examples, *row.shape[1:]) for row in rows]))
    return tree_unflatten(joined, flat[0][1])


def part(output: Any, number: int, replicas: int, examples: int) -> Any:
    """One replica's part of a batched call's output.

    Raises:
        ValueError: something in it cannot be divided: a scalar, a cache.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or (leaf.shape[0] % (replicas * examples) and leaf.shape[0] != replicas):
                raise ValueError(f"an output of shape {tuple(leaf.shape)} cannot be divided")
            return leaf.chunk(replicas)[number]
        if leaf is not None and not isinstance(leaf, (int, float, str, bool)):
            raise ValueError(f"an output of type {type(leaf).__name__} cannot be divided")
        return leaf

    return tree_map(one, output)


def same(one: Any, other: Any) -> bool:
    """Whether two calls have the same inputs."""
    (mine, spec), (theirs, other_spec) = tree_flatten(one), tree_flatten(other)
    return spec == other_spec and all(map(_equal, mine, theirs))


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
