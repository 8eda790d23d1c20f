"""Inputs put behind one another for many replicas, taken apart and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten

from zo_ds.forward.split import first_tensor, join, part, repeat, same, split

Counts = given(replicas=st.integers(1, 5), examples=st.integers(1, 5), width=st.integers(0, 4), seed=st.integers(0, 99))


def inputs_of(examples: int, width: int, seed: int) -> Any:
    """As a layer is called: activations, an option, what is not for each example, and names."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, width, generator=generator)
    mask = torch.randint(0, 2, (examples, 3), generator=generator)
    shared = torch.randn(examples + 1, 2, generator=generator)
    return (x, None), {"mask": mask, "pair": (mask + 1, [x * 2]), "shared": shared, "scale": torch.tensor(2.0), "n": 7}


@Counts
def test_repeat_then_split_gives_each_replica_the_inputs(replicas: int, examples: int, width: int, seed: int) -> None:
    inputs = inputs_of(examples, width, seed)
    if (examples + 1) % (replicas * examples) == 0:
        inputs[1].pop("shared")  # its first axis could be that of all replicas
    parts = split(repeat(inputs, replicas, examples), replicas, examples)
    assert len(parts) == replicas
    assert all(same(each, inputs) for each in parts)


@Counts
def test_join_then_part_gives_each_replica_its_outputs(replicas: int, examples: int, width: int, seed: int) -> None:
    outputs = []
    for number in range(replicas):
        (x, _), kwargs = inputs_of(examples, width, seed + number)
        outputs.append({"x": x, "more": (kwargs["mask"], [kwargs["pair"][0]]), "none": None, "kind": "text"})
    joined = join(outputs, examples)
    assert all(same(part(joined, number, replicas, examples), outputs[number]) for number in range(replicas))
    assert part(joined, replicas - 1, replicas, examples)["kind"] == "text"


@Counts
def test_rows_of_a_replica_come_together(replicas: int, examples: int, width: int, seed: int) -> None:
    inputs = inputs_of(examples, width, seed)
    (x, _), kwargs = repeat(inputs, replicas, examples)
    assert torch.equal(x, torch.cat([inputs[0][0]] * replicas))
    assert first_tensor(((None, 3), {"a": torch.tensor(1.0), "x": x})) is x
    if replicas * examples > 1:
        assert kwargs["scale"] is inputs[1]["scale"]


@pytest.mark.parametrize("shape", [(1, 6, 2), (6, 2), (7, 2)])
def test_what_does_not_depend_on_the_batch_is_the_same_for_all_examples(shape: tuple[int, ...]) -> None:
    own = [torch.full(shape, float(number)) for number in range(3)]
    joined = join(own, 4)
    rest = shape[1:] if shape[0] == 1 else shape
    assert joined.shape == (12, *rest)
    assert [float(row.flatten()[0]) for row in joined] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_a_batch_of_one_costs_no_memory() -> None:
    x = torch.randn(1, 5)
    assert repeat(x, 100, 1).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("examples", [1, 3])
def test_activations_without_a_batch_axis_cannot_be_split(examples: int) -> None:
    with pytest.raises(ValueError, match=r"an input of shape \(5, 2\) has no batch axis"):
        split((torch.randn(5, 2), torch.zeros(2 * examples)), 2, examples)
    tokens = split((torch.arange(7), torch.arange(2 * examples)), 2, examples)
    assert [each[0].tolist() for each in tokens] == [list(range(7))] * 2
    assert [len(each[1]) for each in tokens] == [examples] * 2


@pytest.mark.parametrize("output", [torch.tensor(1.0), torch.zeros(7), {"x": torch.zeros(6), "cache": object()}])
def test_what_cannot_be_divided(output: Any) -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        part(output, 0, 2, 3)


def other(x: Tensor) -> list[Any]:
    return [x + 1, x.double(), x[:1], x.tolist(), None, (x,)]


def test_same() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert same(((x, 1), {"k": None}), ((x.clone(), 1), {"k": None}))
    assert not any(same(x, each) or same(each, x) for each in other(x))
    assert not same(((x,), {"a": 1}), ((x,), {"b": 1}))
    assert not same(1, True)
    assert tree_flatten((x, {"a": 1}))[1] == tree_flatten((x + 1, {"a": 2}))[1]


@pytest.mark.xfail(strict=True, reason="split divides whatever has R * n rows, also a mask or positions of that length")
def test_a_square_mask_of_as_many_tokens_as_sequences_is_left_whole() -> None:
    x, mask = torch.randn(6, 6, 2), torch.zeros(6, 6)
    assert [each[1].shape for each in split((x, mask), 2, 3)] == [(6, 6)] * 2
