"""Greedy decoding of padded rows: with a cache, without one, and against a plain loop over rows of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.asking import causal, log_probabilities
from zo_ds.tasks.decoding import greedy, pad_left

VOCABULARY, NEW = 40, 6
FAMILIES = ("llama", "gpt2", "opt")
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4], [7, 3, 21, 9]]


class Uncached(nn.Module):
    """The same model, without a word of caches or positions in its signature."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


def plain(model: nn.Module, row: Sequence[int], stops: Sequence[int] = (), new: int = NEW) -> list[int]:
    said: list[int] = []
    while len(said) < new and not (said and said[-1] in stops):
        said.append(int(log_probabilities(model, [*row, *said])[-1].argmax()))
    return said


def run(
    model: nn.Module, rows: Sequence[Sequence[int]], stops: Sequence[int] = (), new: int = NEW, **how: bool
) -> list[list[int]]:
    with torch.inference_mode():
        found: list[list[int]] = greedy(model, pad_left(rows, range(len(rows)), 0), new, stops, **how).tolist()
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return causal(request.param, VOCABULARY)


def test_padding_goes_to_the_left() -> None:
    prompts = pad_left([[5], [6, 7, 8]], [3, 1], 9).to(torch.device("cpu"))
    assert prompts.input_ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert prompts.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert prompts.numbers.tolist() == [3, 1]


def test_it_is_what_a_plain_loop_says(model: nn.Module) -> None:
    expected = [plain(model, row) for row in ROWS]
    assert len({tuple(said) for said in expected}) > 2
    assert run(model, ROWS) == expected
    assert run(Uncached(model), ROWS) == expected


def test_rows_do_not_depend_on_their_company(model: nn.Module) -> None:
    together = run(model, ROWS)
    assert [run(model, [row])[0] for row in ROWS] == together
    assert run(model, ROWS[::-1]) == together[::-1]


@pytest.mark.parametrize("new", [1, 2])
def test_no_more_than_asked_for(model: nn.Module, new: int) -> None:
    assert run(model, ROWS, new=new) == [said[:new] for said in run(model, ROWS)]


def test_a_row_that_has_ended_repeats_its_end_until_all_have(model: nn.Module) -> None:
    free = [plain(model, row) for row in ROWS]
    stops = (free[0][1], free[1][3])
    expected = [plain(model, row, stops) for row in ROWS]
    width = max(map(len, expected))
    assert min(map(len, expected)) < width
    assert run(model, ROWS, stops) == [said + said[-1:] * (width - len(said)) for said in expected]
    # Nobody goes on once all have ended.
    first = [said[0] for said in free]
    assert run(model, ROWS, first) == [[token] for token in first]
    # Unless other ranks may have to.
    assert run(model, ROWS, first, lockstep=True) == [[token] * NEW for token in first]


def test_a_cache_saves_what_was_read(model: nn.Module) -> None:
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run(model, ROWS)
    hook.remove()
    assert widths == [max(map(len, ROWS))] + [1] * (NEW - 1)
