"""What a step lowers, from the scores of options: against formulas in plain Python, with options that are not there."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_ds.tasks.objectives import SCORE_LOSSES, ScoreLoss, cross_entropy, error, margin, negative_mean
from zo_ds.tasks.task import Objective

SCORE = st.floats(-50, 50, width=32)


def padded(rows: list[list[float]]) -> torch.Tensor:
    most = max(map(len, rows))
    return torch.tensor([row + [-math.inf] * (most - len(row)) for row in rows])


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    rows = draw(st.lists(st.lists(SCORE, min_size=2, max_size=5), min_size=1, max_size=6))
    return rows, [draw(st.integers(0, len(row) - 1)) for row in rows]


def values(loss: ScoreLoss, rows: list[list[float]], labels: list[int]) -> list[float]:
    found: list[float] = loss(padded(rows), torch.tensor(labels)).tolist()
    return found


@given(questions())
def test_cross_entropy(asked: tuple[list[list[float]], list[int]]) -> None:
    expected = []
    for row, label in zip(*asked, strict=True):
        top = max(row)
        expected.append(top + math.log(math.fsum(math.exp(score - top) for score in row)) - row[label])
    assert values(cross_entropy, *asked) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(questions())
def test_margin(asked: tuple[list[list[float]], list[int]]) -> None:
    pairs = zip(*asked, strict=True)
    expected = [max(score for k, score in enumerate(row) if k != label) - row[label] for row, label in pairs]
    assert values(margin, *asked) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(questions())
def test_error(asked: tuple[list[list[float]], list[int]]) -> None:
    """A tie counts for the first option."""
    assert values(error, *asked) == [float(row.index(max(row)) != label) for row, label in zip(*asked, strict=True)]


@given(questions())
def test_an_error_is_a_margin_above_zero(asked: tuple[list[list[float]], list[int]]) -> None:
    for wrong, gap in zip(values(error, *asked), values(margin, *asked), strict=True):
        assert gap == 0 or wrong == float(gap > 0)


def test_known_values() -> None:
    rows, labels = [[1.0, 3.0, 2.0], [0.0, 0.0]], [2, 1]
    assert values(margin, rows, labels) == [1.0, 0.0]
    assert values(error, rows, labels) == [1.0, 1.0]
    assert values(error, rows, [1, 0]) == [0.0, 0.0]
    assert values(cross_entropy, [[0.0, 0.0]], [1]) == pytest.approx([math.log(2)])
    assert values(cross_entropy, [[-7.0]], [0]) == [0.0]
    assert values(negative_mean, [[-3.0], [-0.5]], [0, 0]) == [3.0, 0.5]


def test_which_objectives_choose_between_options() -> None:
    assert {
        Objective.CROSS_ENTROPY: cross_entropy,
        Objective.MARGIN: margin,
        Objective.ACCURACY: error,
    } == SCORE_LOSSES
