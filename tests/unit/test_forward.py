"""A displaced model is the model with displaced weights, whatever its modules do with their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.conftest import FAMILIES, tiny_model, zo_batch
from zo_ds.errors import ConfigError
from zo_ds.forward.displacement import Displacement
from zo_ds.forward.evaluator import LossFunction
from zo_ds.forward.loss import model_loss
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.update import perturb
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore

PLAN = [None, Displacement(3, 0, 1e-2), Displacement(2**63, 1, -0.05), None, Displacement(3, 0, 1e-2)]
Structure = pytest.mark.parametrize("structure", list(NoiseStructure), ids=lambda s: s.value)


class Root(nn.Module):
    """A model whose forward is given, with children and parameters as keywords."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._call = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self, x)


class Nested(nn.Module):
    """Calls itself, so that it is entered again before it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        return (self(x @ self.weight, depth - 1) if depth else x) @ self.weight


class Counter(nn.Module):
    """Writes its buffers in place and replaces one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean(0) + self.last
        return x * self.calls + self.last


class Always(nn.BatchNorm1d):
    """Batch statistics in evaluation too; the running ones are written each time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.3)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def shared() -> nn.Module:
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(linear().requires_grad_(False), nn.Tanh(), linear())
    model[2].bias.requires_grad_(False)
    return model


def part() -> nn.Module:
    """Gives away a view of its parameter, as learned positions do."""
    return Root(lambda m, n: m.w[:n], w=torch.randn(4, 4))


IDS = torch.arange(4)
AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "lstm": lambda: Root(lambda m, x: m.l(x)[0], l=nn.LSTM(4, 3, num_layers=2, bidirectional=True)),
    "parametrization": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "parameters in a list": lambda: Root(
        lambda m, x: (x @ m.p[0]) @ m.p[1], p=nn.ParameterList([torch.randn(4, 4), torch.randn(4, 2)])
    ),
    "attention reads out_proj.weight": lambda: Root(
        lambda m, x: m.a(x[None], x[None], x[None])[0][0], a=nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "parent reads a child that never runs": lambda: Root(lambda m, x: F.linear(x, m.l.weight, m.l.bias), l=linear()),
    "parent reads a child that runs too": lambda: Root(lambda m, x: m.l(x) @ m.l.weight + m.l(x), l=linear()),
    "parent reads two children": lambda: Root(lambda m, x: m.a(x) @ m.b.weight @ m.a.weight, a=linear(), b=linear()),
    "tied embedding": lambda: Root(lambda m, x: x @ F.linear(m.e(IDS), m.e.weight), e=nn.Embedding(10, 4)),
    "tied embedding, .data": lambda: Root(lambda m, x: x @ m.e(IDS) @ m.e.weight.data.T.mT.T, e=nn.Embedding(9, 4)),
    "one parameter in two modules": shared,
    "one parameter twice in one module": lambda: Root(lambda m, x: x @ m.w @ m.w.T, w=torch.randn(4, 4)),
    "module called twice": lambda: Root(lambda m, x: m.l(m.l(x).tanh()), l=linear()),
    "module within itself": Nested,
    "buffers written in place and replaced": lambda: nn.Sequential(linear(), Counter()),
    "batch norm that goes on counting": lambda: nn.Sequential(linear(), Always(4)),
    "frozen parameters": frozen,
    "not contiguous": lambda: Root(lambda m, x: x @ m.w + m.b, w=torch.rand(6, 4).T, b=torch.ones(6)),
    "scalar parameter": lambda: Root(lambda m, x: m.l(x) * m.s, l=linear(), s=torch.tensor(1.5)),
    "unused parameter": lambda: Root(lambda m, x: m.l(x), l=linear(), spare=torch.randn(3)),
    "views of parameters given away": lambda: Root(lambda m, x: x @ (m.a(4) * m.b(4)), a=part(), b=part()),
}
FUSED = {"attention reads out_proj.weight", "encoder layer"}


class Setup(NamedTuple):
    original: nn.Module
    infos: Mapping[nn.Parameter, ParamInfo]
    store: ResidentStore
    evaluator: SequentialEvaluator


def set_up(
    model: nn.Module,
    structure: NoiseStructure = NoiseStructure.DENSE,
    loss_fn: LossFunction = lambda m, x: m(x).flatten(1).mean(1),
    autocast: torch.dtype | None = None,
) -> Setup:
    infos = trainable_parameters(model)
    original = copy.deepcopy(model.eval())
    evaluator = SequentialEvaluator(model, Perturber(model, infos, structure), loss_fn, autocast)
    return Setup(original, infos, ResidentStore(model, infos, structure), evaluator)


def displaced_copy(setup: Setup, displacement: Displacement | None) -> nn.Module:
    """An independent model whose trained parameters are replaced for good."""
    model = copy.deepcopy(setup.original)
    if displacement is not None:
        infos = {info.name: info for info in setup.infos.values()}
        seed, direction, eps = displacement.seed, displacement.direction, displacement.eps
        for name, p in model.named_parameters():
            if name in infos:
                site = infos[name].site(setup.store.structure)
                p.data = perturb(p.data.contiguous(), site, seed, direction, eps).reshape(p.shape)
    return model


def state(model: nn.Module) -> list[tuple[str, int, Tensor]]:
    return [(k, v.data_ptr(), v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()]


def check_state(model: nn.Module, before: list[tuple[str, int, Tensor]]) -> None:
    for (name, pointer, value), (wanted, same_pointer, same) in zip(state(model), before, strict=True):
        assert (name, pointer) == (wanted, same_pointer)
        assert torch.equal(value, same), name


def check(setup: Setup, batch: Any, loss_fn: LossFunction, exact: bool = True, autocast: Any = None) -> None:
    before, digest = state(setup.store.module), setup.store.digest()
    found = setup.evaluator.losses(batch, PLAN)
    expected = []
    for displacement in PLAN:
        with torch.no_grad(), torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            expected.append(loss_fn(displaced_copy(setup, displacement), batch).detach().reshape(-1).double())
    wanted = torch.stack(expected)
    assert found.dtype == torch.float64
    assert torch.equal(found, wanted) if exact else torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[0], found[3])
    assert torch.equal(found[1], found[4])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    check_state(setup.store.module, before)
    assert setup.store.digest() == digest


@Structure
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_families(family: str, structure: NoiseStructure, dtype: torch.dtype) -> None:
    autocast = None if dtype == torch.float32 else dtype
    setup = set_up(tiny_model(family, dtype=dtype), structure, model_loss, autocast)
    check(setup, zo_batch(family), model_loss, autocast=autocast)
    dtypes = {(info.is_matrix, p.dtype) for p, info in setup.infos.items()}
    assert dtypes == {(True, dtype), (False, torch.float32)}


@Structure
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_modules(name: str, structure: NoiseStructure) -> None:
    torch.manual_seed(1)
    setup = set_up(AWKWARD[name](), structure)
    check(setup, torch.randn(3, 4), lambda m, x: m(x).flatten(1).mean(1), exact=name not in FUSED)


def test_loss_function_that_reads_weights() -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).mean(1) + 0.1 * sum(p.pow(2).sum() for p in model.parameters())

    torch.manual_seed(1)
    check(set_up(nn.Sequential(linear(), linear()), loss_fn=loss_fn), torch.randn(3, 4), loss_fn)


@pytest.mark.parametrize("where", ["module", "loss_fn"])
@pytest.mark.parametrize(("at", "error"), [(1, ZeroDivisionError), (2, KeyboardInterrupt), (3, ZeroDivisionError)])
def test_weights_and_buffers_are_back_after_an_exception(where: str, at: int, error: type[BaseException]) -> None:
    calls, armed = [0], [True]

    def bomb(place: str) -> None:
        calls[0] += place == where
        if calls[0] == at and armed:
            armed.clear()
            raise error("injected")

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        losses = model(x).mean(1)
        bomb("loss_fn")
        return losses

    class Fuse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bomb("module")
            return x

    torch.manual_seed(1)
    model = Root(lambda m, x: m.t(m.f(m.c(m.l(x)))) @ m.l.weight, l=linear(), c=Counter(), f=Fuse(), t=linear())
    setup = set_up(model, loss_fn=loss_fn)
    before, digest = state(model), setup.store.digest()
    with pytest.raises(error, match="injected"):
        setup.evaluator.losses(torch.randn(3, 4), PLAN)
    assert not armed
    check_state(model, before)
    assert setup.store.digest() == digest
    check(setup, torch.randn(3, 4), lambda m, x: m(x).mean(1))


@pytest.mark.parametrize("first", ["another function", "a failure"])
def test_buffers_that_change_later_are_put_back(first: str) -> None:
    model = nn.Sequential(linear(), Counter())
    setup = set_up(model)
    before = state(model)
    if first == "another function":
        setup.evaluator.call(lambda m, x: m[0](x), torch.randn(3, 4))
    else:
        with pytest.raises(RuntimeError, match="shape"):
            setup.evaluator.losses(torch.randn(3, 5), [None])
    losses = setup.evaluator.losses(torch.randn(3, 4), [None] * 3)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[1], losses[2])
    check_state(model, before)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (1, 1, 1)])
def test_loss_of_two_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    setup = set_up(linear(), loss_fn=lambda m, x: m(x).sum() * torch.ones(shape))
    with pytest.raises(ConfigError, match="loss_fn returned a tensor of shape") as caught:
        setup.evaluator.losses(torch.randn(3, 4), [None, PLAN[1]])
    assert str(shape) in caught.value.what


@pytest.mark.parametrize("kind", [float, np.float64, torch.tensor])
def test_objective_that_cannot_be_differentiated(kind: Callable[[float], Any]) -> None:
    def errors(model: nn.Module, x: Tensor) -> Any:
        choice = model(x).numpy().argmax(axis=1)
        return kind(float((choice != 0).mean()))

    torch.manual_seed(1)
    check(set_up(linear(), loss_fn=errors), torch.randn(2000, 4), lambda m, x: torch.as_tensor(errors(m, x)))


def test_model_without_a_loss_is_refused() -> None:
    batch = zo_batch()
    del batch["labels"]
    with pytest.raises(ConfigError, match="the model returned no loss"):
        model_loss(tiny_model("llama"), batch)
    with pytest.raises(ConfigError, match="the model returned no loss"):
        model_loss(linear(), torch.randn(3, 4))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_only_labelled_positions_reach_the_head(family: str) -> None:
    model, batch = tiny_model(family).eval(), zo_batch(family)
    batch["labels"][:, :5] = -100
    seen: list[int] = []
    with torch.no_grad():
        wanted = model(**batch).loss
        model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1].numel()))
        found = model_loss(model, batch)
    assert seen == [int((batch["labels"][:, 1:] != -100).sum())]
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    # Whatever asks for more than the plain loss gets the model's own.
    with torch.no_grad():
        assert torch.equal(
            model_loss(model, {**batch, "num_items_in_batch": 3}), model(**batch, num_items_in_batch=3).loss
        )


def test_calls_see_evaluation_mode_without_gradients() -> None:
    setup = set_up(nn.Sequential(linear(), nn.Dropout(0.9)).train())
    batch = torch.randn(3, 4)
    assert torch.equal(setup.evaluator.call(lambda m, x: m(x), batch), setup.original(batch))
    assert setup.evaluator.call(lambda m, x: (m.training, m(x).requires_grad), batch) == (False, False)
