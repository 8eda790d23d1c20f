"""Inputs put behind one another for many replicas, taken apart and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zo_ds.forward.split import first_tensor, join, kept, part, repeat, same, split, with_batch_axis

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
    batched = with_batch_axis(inputs, examples)
    parts = split(repeat(inputs, replicas, batched), replicas, batched)
    assert len(parts) == replicas
    assert all(same(each, inputs) for each in parts)


@Counts
def test_join_then_part_gives_each_replica_its_outputs(replicas: int, examples: int, width: int, seed: int) -> None:
    outputs = []
    for number in range(replicas):
        (x, _), kwargs = inputs_of(examples, width, seed + number)
        outputs.append({"x": x, "more": (kwargs["mask"], [kwargs["pair"][0]]), "none": None, "kind": "text"})
    joined = join(outputs)
    assert all(same(part(joined, number, replicas, examples), outputs[number]) for number in range(replicas))
    assert part(joined, replicas - 1, replicas, examples)["kind"] == "text"


@Counts
def test_rows_of_a_replica_come_together(replicas: int, examples: int, width: int, seed: int) -> None:
    inputs = inputs_of(examples, width, seed)
    (x, _), kwargs = repeat(inputs, replicas, with_batch_axis(inputs, examples))
    assert torch.equal(x, torch.cat([inputs[0][0]] * replicas))
    assert first_tensor(((None, 3), {"a": torch.tensor(1.0), "x": x})) is x
    if replicas * examples > 1:
        assert kwargs["scale"] is inputs[1]["scale"]


def test_a_mask_of_one_packed_row_costs_no_memory() -> None:
    mask, ids = torch.randn(1, 1, 5, 5), torch.arange(5)[None]
    repeated = repeat((mask, ids), 100, [True, True])
    assert repeated[0].data_ptr() == mask.data_ptr()
    # The model may write to what is small.
    repeated[1][3] = 7
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    assert repeated[1][2].tolist() == [0, 1, 2, 3, 4]


def test_only_what_is_batched_is_divided() -> None:
    x, mask = torch.randn(6, 6, 2), torch.zeros(6, 6)
    parts = split((x, mask), 2, [True, False])
    assert [each[0].shape for each in parts] == [(3, 6, 2)] * 2
    assert all(each[1] is mask for each in parts)
    with pytest.raises(ValueError, match=r"an input of shape \(5, 2\) cannot be divided by 2"):
        split(torch.randn(5, 2), 2, [True])


def test_what_is_kept_does_not_change_with_the_caller() -> None:
    ids = torch.arange(4)
    copies = kept({"ids": ids, "n": 3})
    assert same(copies, {"ids": ids, "n": 3})
    ids[0] = 9
    assert not same(copies, {"ids": ids, "n": 3})


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
