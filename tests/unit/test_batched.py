"""The batched forward against the sequential one and against the update itself, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import zo_ds
from tests.conftest import STORES, tiny_model, zo_batch
from tests.unit.families import batch_for, family, fzoo, gap, mezo, pair, per_example
from tests.unit.test_forward import AWKWARD, Root
from zo_ds.errors import ConfigError
from zo_ds.forward import leaves
from zo_ds.forward.displacement import Place
from zo_ds.forward.leaves import Leaf
from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.estimators import Estimator, EstimatorSpec, verdict
from zo_ds.maths.noise import step_seed
from zo_ds.maths.update import Term, Update
from zo_ds.ops.plan import Plan
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore

pytestmark = pytest.mark.usefixtures("one_thread")
Structure = pytest.mark.parametrize("structure", list(NoiseStructure), ids=lambda s: s.value)
SEED, STEP = 11, 3


def moved(model: nn.Module, structure: NoiseStructure, update: Update) -> nn.Module:
    """A copy of a model, after an update."""
    model = copy.deepcopy(model)
    ResidentStore(model, trainable_parameters(model), structure).apply(Plan.of(SEED, [update]))
    return model


def estimate(model: nn.Module, structure: NoiseStructure, losses: Tensor) -> Tensor:
    """``sum_i (l_i - l_0) u_i`` by the update's own arithmetic."""
    zeros = copy.deepcopy(model)
    for parameter in zeros.parameters():
        parameter.data.zero_()
    terms = tuple(Term(STEP, i, -float(c)) for i, c in enumerate(losses[1:] - losses[0]))
    found = moved(zeros, structure, Update(STEP, terms))
    return torch.cat([p.detach().flatten() for p in found.parameters()])


@Structure
@pytest.mark.parametrize("name", ["llama", "opt-350m", "roberta-mlm", "mixtral"])
def test_gradient_estimates(name: str, structure: NoiseStructure) -> None:
    found = pair(family(name), per_example, structure)
    places = fzoo(8, 1e-3, step_seed(SEED, STEP))
    batched, sequential = (
        estimate(family(name), structure, e.losses(batch_for(name), places).mean(1))
        for e in (found.batched, found.sequential)
    )
    assert F.cosine_similarity(batched, sequential, dim=0) > 0.9999


@Structure
@pytest.mark.parametrize("estimator", [Estimator.FZOO, Estimator.MEZO])
def test_coefficients_do_not_depend_on_places_in_a_pass(estimator: Estimator, structure: NoiseStructure) -> None:
    # Summed in fp64 from fp32 logits; a mean rounded to fp32 would hide 1e-4 of a difference of losses.
    spec, eps = EstimatorSpec(estimator, num_directions=8), 1e-2
    places = fzoo(8, eps) if estimator is Estimator.FZOO else mezo(8, eps)
    models = [pair(family("llama"), per_example, structure, replicas=k) for k in (1, 2, 3, 5, 9)]
    losses = [models[0].sequential.losses(batch_for("llama"), places)]
    losses += [m.batched.losses(batch_for("llama"), places) for m in models]
    wanted, *others = (verdict(each.mean(1), spec, 1e-3, eps).coefficients for each in losses)
    assert wanted.abs().max() > 0
    assert all((other - wanted).abs().max() < 1e-4 * wanted.abs().max() for other in others)


@Structure
@pytest.mark.parametrize("name", ["llama", "opt-125m", "bert-mlm", "qwen3-moe"])
def test_strict_gives_the_same_bits_whatever_the_memory(name: str, structure: NoiseStructure) -> None:
    sizes = [{}, {"replicas": 1}, {"replicas": 9}, {"budget_bytes": 1}, {"budget_bytes": 2**40}]
    found = [pair(family(name), per_example, structure, strict=True, **size) for size in sizes]
    runs = [[each.batched.losses(batch_for(name), places) for places in (fzoo(8), mezo(3))] for each in found]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def positions() -> nn.Module:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    return OPTLearnedPositionalEmbedding(10, 4)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 4)


def rms_norm(kind: str) -> nn.Module:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm}[kind](4)


def lora() -> nn.Module:
    import peft

    model = Root(lambda m, x: m.l(x), l=nn.Linear(4, 5))
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["l"], r=2), model)


def attention() -> nn.Module:
    return Root(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True))


def tied_head() -> nn.Module:
    model = Root(lambda m, ids: m.h(m.e(ids)), e=nn.Embedding(10, 4), h=nn.Linear(4, 10, bias=False))
    model.h.weight = model.e.weight
    return model


def wavy_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Depends on every output; the mean of what a layer norm gives, or of its squares, does not."""
    return torch.sin(model(batch).flatten(1).double() * 1.7).sum(1)


VECTORS, IDS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2)), torch.arange(15).view(3, 5) % 10
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 6), VECTORS),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), VECTORS),
    "conv1d": (conv1d, VECTORS),
    "embedding": (lambda: nn.Embedding(10, 4), IDS),
    "opt positions": (positions, MASK),
    "layer norm": (lambda: nn.LayerNorm(4), VECTORS),
    "layer norm over two axes": (lambda: nn.LayerNorm([5, 4]), VECTORS),
    "llama rms norm": (lambda: rms_norm("llama"), VECTORS),
    "gemma rms norm": (lambda: rms_norm("gemma"), VECTORS),
    "rms norm": (lambda: nn.RMSNorm(4), VECTORS),
    "lora": (lora, VECTORS),
    "tied head": (tied_head, IDS),
    "attention": (attention, VECTORS),
}


@Structure
@pytest.mark.parametrize("layer", LAYERS)
def test_losses_are_those_after_an_update_along_the_direction(layer: str, structure: NoiseStructure) -> None:
    torch.manual_seed(1)
    build, batch = LAYERS[layer]
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)

    found, eps = pair(copy.deepcopy(model), wavy_loss, structure), 2**-6
    losses = found.batched.losses(batch, fzoo(3, eps, step_seed(SEED, STEP)))
    for number in range(3):
        after = [moved(model, structure, Update(STEP, (Term(STEP, number + k, -eps),))) for k in (0, 1)]
        with torch.no_grad():
            right, wrong = (wavy_loss(each, batch) for each in after)
        assert torch.allclose(losses[1 + number], right, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(losses[1 + number], wrong, rtol=1e-5, atol=1e-4)


@Structure
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_modules_are_right_or_refused(name: str, structure: NoiseStructure) -> None:
    torch.manual_seed(1)
    found, refused = pair(AWKWARD[name](), wavy_loss, structure), name == "buffers written in place and replaced"
    torch.manual_seed(2)
    for _ in range(2):
        if refused:
            with pytest.raises(ConfigError, match="gives other values"):
                found.batched.losses(torch.randn(3, 4), fzoo(3))
        else:
            assert gap(found, torch.randn(3, 4), fzoo(3)) < 1e-5


def other_direction(module: Any, replicas: Any, original: Any, x: Tensor) -> Tensor:
    replicas._directions = [d + 1 for d in replicas._directions]
    try:
        return leaves._linear(module, replicas, original, x)
    finally:
        replicas._directions = [d - 1 for d in replicas._directions]


def bias_left_alone(module: Any, replicas: Any, original: Any, x: Tensor) -> Tensor:
    return leaves._product(module, replicas, x, module.weight, None, transposed=False) + module.bias


def weight_left_alone(module: Any, replicas: Any, original: Any, x: Tensor) -> Tensor:
    plain = F.linear(x, module.weight).view(replicas.count, -1, module.out_features)
    return (plain + replicas.all(module.bias).unsqueeze(1)).view(*x.shape[:-1], -1)


def mixed_up(module: Any, replicas: Any, original: Any, x: Tensor) -> Tensor:
    return leaves._linear(module, replicas, original, x).roll(replicas.together.examples, 0)


@Structure
@pytest.mark.parametrize("leaf", [other_direction, bias_left_alone, weight_left_alone, mixed_up])
def test_broken_leaf_is_named(leaf: Leaf, structure: NoiseStructure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(leaves._LEAVES, nn.Linear, leaf)
    found = pair(family("bert-classes"), per_example, structure)
    first = r"layer 'bert\.encoder\.layer\.0\.attention\.self\.query' gives other values"
    with pytest.raises(ConfigError, match=first):
        found.batched.losses(batch_for("bert-classes"), fzoo(4, 1e-3))


def step(model: nn.Module, store: str, noise: str) -> tuple[Any, ...]:
    zeroth_order = {"num_directions": 5, "lr": 5e-3, "noise": noise, "strict": True}
    engine = zo_ds.initialize(model, {"zero_optimization": STORES[store], "zeroth_order": zeroth_order})
    taken = [engine.step(zo_batch("llama", seed=seed)) for seed in (1, 2)]
    return [(s.clean_loss, s.spread, s.coefficients.tolist()) for s in taken], engine.digest()


@pytest.mark.parametrize("noise", ["dense", "factored"])
@pytest.mark.parametrize("store", ["zero3", "zero3-cpu"])
def test_sharded_weights_take_the_same_steps(store: str, noise: str) -> None:
    assert step(tiny_model("llama"), store, noise) == step(tiny_model("llama"), "resident", noise)


def test_sharded_weights_are_gathered_once_for_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero import partition_parameters

    gathered: list[Any] = []
    for kind in (partition_parameters.NoGatherHandle, partition_parameters.NoGatherCoalescedHandle):

        def counting(self: Any, arg: Any, original: Any = kind.__init__) -> None:
            original(self, arg)
            gathered.extend(arg if isinstance(arg, list) else [arg])

        monkeypatch.setattr(kind, "__init__", counting)
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    zeroth_order = {"num_directions": 8, "replicas_per_pass": 9}
    engine = zo_ds.initialize(model, {"zero_optimization": STORES["zero3"], "zeroth_order": zeroth_order})
    engine.step(zo_batch())
    head: Any = model.lm_head.weight
    gather = head.all_gather
    head.all_gather = lambda *args, **options: (gathered.append(head), gather(*args, **options))[1]
    gathered.clear()
    places: list[Place] = fzoo(8)
    engine._evaluator.losses(zo_batch(), places)
    times = {name: sum(p is each for each in gathered) for name, p in model.named_parameters()}
    # The head runs 9 times, but is held.
    assert times == dict.fromkeys(times, 1)
