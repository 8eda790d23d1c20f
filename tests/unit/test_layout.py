"""Wherever sequences are laid out, each token is there once, with its own position, and sees only its own sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_ds.tasks.layout import GROUP_COST, Layout, Prompt, packed, padded

PAD = 0
ROWS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=40).map(tuple), min_size=1, max_size=12)
PROMPTS = st.lists(
    st.builds(
        Prompt,
        st.lists(st.integers(1, 50), min_size=1, max_size=12).map(tuple),
        st.lists(st.lists(st.integers(1, 50), max_size=3).map(tuple), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=8,
)


def computed(layout: Layout) -> int:
    return sum(part["input_ids"].numel() for part in layout.parts)


@given(ROWS)
def test_padded_rows_hold_every_sequence_once(rows: list[tuple[int, ...]]) -> None:
    layout = padded(rows, PAD)
    assert len({place[:2] for place in layout.places}) == len(rows) == sum(len(p["input_ids"]) for p in layout.parts)
    for row, (part, number, start) in zip(rows, layout.places, strict=True):
        ids, mask = (layout.parts[part][key][number].tolist() for key in ("input_ids", "attention_mask"))
        assert start == 0
        assert tuple(ids[: len(row)]) == row
        assert mask == [1] * len(row) + [0] * (len(ids) - len(row))
        assert set(ids[len(row) :]) <= {PAD}


@given(ROWS)
def test_groups_cost_least(rows: list[tuple[int, ...]]) -> None:
    """Against every way to cut the sorted lengths."""
    rows = rows[:7]
    lengths = sorted(map(len, rows))
    costs = []
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(rows)]
        costs.append(sum((b - a) * lengths[b - 1] + GROUP_COST for a, b in itertools.pairwise(edges)))
    layout = padded(rows, PAD)
    assert computed(layout) + GROUP_COST * len(layout.parts) == min(costs)


@given(PROMPTS, st.booleans(), st.sampled_from([1, None]), st.integers(0, 2))
def test_packed_tokens_see_their_own_sequence_only(
    prompts: list[Prompt], causal: bool, rows: int | None, first: int
) -> None:
    layout = packed(prompts, PAD, causal=causal, hidden_size=64, first_position=first, rows=rows)
    (part,) = layout.parts
    if "position_ids" not in part:
        assert rows is None
        assert not any(prompt.branches for prompt in prompts)
        return
    ids, positions, sees = part["input_ids"], part["position_ids"], part["attention_mask"]
    assert sees.shape == (len(ids), 1, ids.shape[1], ids.shape[1])
    seen = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(ids), 1, 1)
    for prompt, (_, row, start) in zip(prompts, layout.places, strict=True):
        branches = [(0, -1, prompt.stem), *((len(prompt.stem), k, b) for k, b in enumerate(prompt.branches))]
        stem = list(range(start, start + len(prompt.stem)))
        for offset, number, tokens in branches:
            first_place = start if number < 0 else start + prompt.place(number, 0)
            own = list(range(first_place, first_place + len(tokens)))
            for k, place in enumerate(own):
                assert ids[row, place] == tokens[k]
                assert positions[row, place] == first + offset + k
                allowed = own if number < 0 else stem + own
                seen[row, place, [other for other in allowed if not causal or other <= place]] = True
        assert start + prompt.place(0, -1) == stem[-1]
    assert torch.equal(sees[:, 0], seen)
    assert int((ids != PAD).sum()) == sum(prompt.length for prompt in prompts)


@pytest.mark.parametrize("lengths", [[17] * 8, [64] * 16])
def test_nothing_is_packed_where_nothing_is_padded(lengths: list[int]) -> None:
    layout = packed([Prompt((1,) * n) for n in lengths], PAD, causal=True, hidden_size=576)
    assert "position_ids" not in layout.parts[0]


def test_packing_saves_padding() -> None:
    lengths = [10, 50, 12, 13, 40, 11, 9, 30]
    prompts = [Prompt((1,) * n) for n in lengths]
    layout = packed(prompts, PAD, causal=True, hidden_size=576)
    assert computed(layout) <= 1.1 * sum(lengths) < 0.5 * len(lengths) * max(lengths)
    # In a narrow model attention costs more than the products of the tokens that padding would add.
    narrow = packed(prompts, PAD, causal=True, hidden_size=1)
    assert len(narrow.parts[0]["input_ids"]) > len(layout.parts[0]["input_ids"])
