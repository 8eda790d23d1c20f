"""Inputs and outputs of many replicas: put behind one another along the first axis, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

PLAIN = (int, float, complex, str, bool, torch.dtype, torch.device, type(None))


def first_tensor(inputs: Any) -> Tensor | None:
    """The first tensor with axes among a call's inputs; what its first axis counts are the examples."""
    return next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)


def is_plain(inputs: Any) -> bool:
    """Whether there are only tensors and plain values: nothing (a cache) that a call may change or that holds more."""
    return all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in tree_leaves(inputs))


def repeat(inputs: Any, replicas: int, batched: Sequence[bool]) -> Any:
    """Tensors that have the batch axis, so many times.

    Args:
        inputs: any tree.
        replicas: how often.
        batched: for each leaf of the tree, whether it is such a tensor.
    """
    leaves, spec = tree_flatten(inputs)
    repeated = [_times(leaf, replicas) if has else leaf for leaf, has in zip(leaves, batched, strict=True)]
    return tree_unflatten(repeated, spec)


def with_batch_axis(inputs: Any, examples: int) -> list[bool]:
    """For each leaf of a tree, whether it looks like a tensor with so many examples."""
    return [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == examples for t in tree_leaves(inputs)]


def _times(tensor: Tensor, replicas: int) -> Tensor:
    if tensor.dim() > 3 and tensor.shape[0] == 1:
        # A block mask of one packed row: large, and only read.
        return tensor.expand(replicas, *tensor.shape[1:])
    return tensor.repeat(replicas, *[1] * (tensor.dim() - 1))


def split(inputs: Any, replicas: int, batched: Sequence[bool]) -> list[Any]:
    """A call's inputs for each replica: parts of tensors whose first axis is replica-major, all else as it is.

    Args:
        inputs: any tree.
        replicas: R.
        batched: for each leaf of the tree, whether it is to be divided.

    Raises:
        ValueError: one cannot be.
    """
    leaves, spec = tree_flatten(inputs)
    parts: list[list[Any]] = [[] for _ in range(replicas)]
    for leaf, divided in zip(leaves, batched, strict=True):
        if divided and leaf.shape[0] % replicas:
            raise ValueError(f"an input of shape {tuple(leaf.shape)} cannot be divided by {replicas}")
        pieces = leaf.chunk(replicas) if divided else [leaf] * replicas
        for own, piece in zip(parts, pieces, strict=True):
            own.append(piece)
    return [tree_unflatten(own, spec) for own in parts]


def join(outputs: Sequence[Any]) -> Any:
    """What a batched call would have given, from the outputs of each replica's own call."""
    flat = [tree_flatten(output) for output in outputs]
    joined: list[Any] = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        together = isinstance(column[0], Tensor) and column[0].dim() > 0
        joined.append(torch.cat(column) if together else column[0])
    return tree_unflatten(joined, flat[0][1])


def part(output: Any, number: int, replicas: int, examples: int) -> Any:
    """One replica's part of a batched call's output.

    Raises:
        ValueError: something in it cannot be divided: a scalar, a cache.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or leaf.shape[0] % (replicas * examples):
                raise ValueError(f"an output of shape {tuple(leaf.shape)} cannot be divided")
            return leaf.chunk(replicas)[number]
        if not isinstance(leaf, PLAIN):
            raise ValueError(f"an output of type {type(leaf).__name__} cannot be divided")
        return leaf

    return tree_map(one, output)


def without_caches(output: Any) -> Any:
    """An output with None for its key-value caches: some models give back the prefix that they were given."""
    return tree_map(lambda leaf: None if hasattr(leaf, "get_seq_length") else leaf, output)


def kept(inputs: Any) -> Any:
    """Inputs to compare others with later: copies, since a caller may write to its own."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.dim() < 4 else leaf, inputs)


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
