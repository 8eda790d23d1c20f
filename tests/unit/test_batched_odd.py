"""Models that no library has: each is computed rightly or refused, on the first batch and on later ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.families import fzoo, gap, pair
from tests.unit.test_forward import Root, displaced_copy, set_up
from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:enable_nested_tensor")]
Structure = pytest.mark.parametrize("structure", list(NoiseStructure), ids=lambda s: s.value)
Build = Callable[[], nn.Module]


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (1 + torch.sin(model(x).flatten(1).double() * 1.7)).sum(1)


def linear(fan_in: int = 4, fan_out: int = 4) -> nn.Linear:
    return nn.Linear(fan_in, fan_out)


def two(forward: Callable[[Any, Tensor], Tensor], second: nn.Module | None = None) -> Build:
    return lambda: Root(forward, a=linear(), b=linear() if second is None else copy.deepcopy(second))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class Experts(nn.Module):
    """Each sees the tokens that chose it; one that none chose is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = linear(4, 2), nn.ModuleList([linear(), linear()])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        scores = self.router(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (scores.argmax(1) == number).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * scores[rows, number, None])
        return out.view(x.shape)


def convolutions(side: int) -> Build:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), linear(4 * (side - 2) ** 2))
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


def encoder(**options: Any) -> Build:
    return lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, **options), 2)


def on_positions(model: Any, x: Tensor) -> Tensor:
    return model.b(model.a(x) + model.e(torch.arange(x.shape[1])))


def positions() -> nn.Module:
    return Root(on_positions, a=linear(), b=linear(), e=nn.Embedding(20, 4))


TABLE = nn.Embedding(4, 4)
ODD: dict[str, tuple[Build, Sequence[tuple[int, ...]]]] = {
    "convolutions": (convolutions(7), [(3, 3, 7, 7), (2, 3, 7, 7)]),
    "convolutions, as wide as channels": (convolutions(6), [(3, 3, 6, 6)]),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4)), [(3, 4, 6), (3, 4, 7)]),
    "prelu on channels": (lambda: nn.Sequential(nn.PReLU(4), linear()), [(3, 4, 4)]),
    "one slope": (lambda: nn.Sequential(linear(4, 1), nn.PReLU(), linear(1)), [(3, 4)]),
    "encoder": (encoder(batch_first=True), [(3, 5, 4), (5, 5, 4), (3, 12, 4)]),
    "encoder before": (encoder(batch_first=True, norm_first=True), [(3, 5, 4), (5, 5, 4)]),
    "lstm": (lambda: Root(lambda m, x: m.l(x)[0], l=nn.LSTM(4, 3, batch_first=True)), [(3, 5, 4)]),
    "keywords only": (two(lambda m, x: m.b(input=m.a(input=x)), nn.LayerNorm(4)), [(3, 4)]),
    "norm of a transposed view": (two(lambda m, x: m.b(m.a(x).mT), nn.LayerNorm(5)), [(3, 5, 4)]),
    "rms norm of a transposed view": (two(lambda m, x: m.b(m.a(x).mT), nn.RMSNorm(5)), [(3, 5, 4)]),
    "as wide as all sequences": (lambda: nn.Sequential(linear(4, 12), nn.LayerNorm(12), linear(12)), [(3, 4)]),
    "dropout left on": (lambda: nn.Sequential(linear(), nn.Dropout(0.5), linear()).train(), [(3, 4)]),
    "no token axis": (lambda: nn.Sequential(linear(), nn.LayerNorm(4), linear()), [(1, 4), (4, 4), (5, 4)]),
    "tokens first": (two(lambda m, x: m.b(m.a(x).transpose(0, 1)).transpose(0, 1)), [(3, 5, 4), (3, 12, 4)]),
    "tokens first, square": (two(lambda m, x: m.b(m.a(x).transpose(0, 1)).transpose(0, 1)), [(4, 4, 4)]),
    "mean over the batch": (two(lambda m, x: m.b(m.a(x) - m.a(x).mean(0))), [(3, 4)]),
    "softmax over the batch": (two(lambda m, x: m.b(m.a(x).softmax(0))), [(3, 4)]),
    "one example at a time": (two(lambda m, x: torch.cat([m.b(row[None]) for row in m.a(x)])), [(3, 4), (12, 4)]),
    "only the first": (two(lambda m, x: m.a(x) + m.b(m.a(x)[:1])), [(3, 4), (12, 4)]),
    "constant input": (two(lambda m, x: m.a(x) + m.b(torch.eye(4)).sum(0)), [(3, 4), (1, 4)]),
    "constant input, one example": (two(lambda m, x: m.a(x) + m.b(torch.eye(4)).sum(0)), [(1, 4)]),
    "experts": (Experts, [(3, 5, 4), (3, 4, 4), (4, 8, 4)]),
    "positions [tokens]": (positions, [(3, 5, 4), (5, 5, 4), (3, 6, 4)]),
    "positions [tokens], as many as sequences": (positions, [(3, 5, 4), (3, 12, 4)]),
    "one row for all": (two(lambda m, x: m.a(x) + m.b(torch.tensor(2)), TABLE), [(3, 5, 4)]),
    "whole table as a matrix": (two(lambda m, x: m.a(x) @ m.b(torch.arange(4)), TABLE), [(3, 4)]),
    "mask": (Masked, [(3, 5, 4), (3, 3, 4)]),
    "mask, as many tokens as sequences": (Masked, [(3, 12, 4)]),
}


@Structure
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str, structure: NoiseStructure) -> None:
    build, shapes = ODD[name]
    torch.manual_seed(1)
    found, plain = pair(build(), loss_fn, structure), None
    torch.manual_seed(1)
    plain = set_up(build(), structure, loss_fn)
    torch.manual_seed(2)
    try:
        for shape in shapes:
            x = torch.randn(shape)
            assert gap(found, x, fzoo(3)) < 1e-5
            # Not only like the sequential evaluator: like a model that was displaced for good.
            losses = found.batched.losses(x, fzoo(3))
            with torch.inference_mode():
                wanted = torch.stack([loss_fn(displaced_copy(plain, place), x) for place in fzoo(3)])
            assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-5)
    except ConfigError:
        # Right too, on the first batch: nobody wants to lose a run to the thousandth.
        assert shape == shapes[0]


def test_experts_that_share_the_tokens_only_later() -> None:
    model = Experts()
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([9.0, 0.0]))
    found = pair(model, loss_fn)
    torch.manual_seed(2)
    assert gap(found, torch.randn(3, 5, 4) * 0.01, fzoo(3)) < 1e-5
    assert gap(found, torch.randn(3, 5, 4) * 10, fzoo(3)) < 1e-5
