"""One batched forward gives the losses of the sequential evaluator, for every family of transformers and adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.families import MOE, SPECS, batch_for, family, fzoo, gap, mezo, pair, per_example
from zo_ds.forward.displacement import Displacement, Place
from zo_ds.forward.evaluator import LossFunction
from zo_ds.forward.loss import model_loss
from zo_ds.maths.directions import NoiseStructure

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*lora_bias|.*tie_word_embeddings"),
]
Structure = pytest.mark.parametrize("structure", list(NoiseStructure), ids=lambda s: s.value)
EXACT = 1e-5


@Structure
@pytest.mark.parametrize("loss_fn", [model_loss, per_example])
@pytest.mark.parametrize("name", SPECS)
def test_families(name: str, loss_fn: LossFunction, structure: NoiseStructure) -> None:
    found = pair(family(name), loss_fn, structure)
    for seed in (7, 8):
        assert gap(found, batch_for(name), fzoo(4, seed=seed)) < EXACT
    assert gap(found, batch_for(name, 3, 5), fzoo(4)) < EXACT


@pytest.mark.parametrize("name", SPECS)
def test_layers_with_more_values_than_are_compared(name: str) -> None:
    # RoBERTa's positions begin at 2.
    assert gap(pair(family(name, max_position_embeddings=18)), batch_for(name, 8, 16), fzoo(4)) < EXACT


@pytest.mark.parametrize("name", SPECS)
def test_blocks_run_once_for_all_places(name: str) -> None:
    found, calls = pair(family(name), replicas=9), [0]
    found.batched.losses(batch_for(name), fzoo(4))
    block = next(m for m in found.model.modules() if isinstance(m, nn.ModuleList))[0]
    block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found.batched.losses(batch_for(name), fzoo(4))
    assert calls == [1]


def test_a_batch_that_fails_first_does_not_cost_the_joining() -> None:
    found, calls = pair(family("opt-125m"), replicas=9), [0]
    bad = {**batch_for("opt-125m"), "input_ids": batch_for("opt-125m")["input_ids"] + 10_000}
    with pytest.raises(IndexError):
        found.batched.losses(bad, fzoo(4))
    found.batched.losses(batch_for("opt-125m"), fzoo(4))
    block = next(m for m in found.model.modules() if isinstance(m, nn.ModuleList))[0]
    block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found.batched.losses(batch_for("opt-125m"), fzoo(4))
    assert calls == [1]


@pytest.mark.parametrize("name", sorted(MOE))
def test_routing_of_each_place_is_its_own(name: str) -> None:
    # Large enough for tokens to change experts, in batches of several shapes.
    found = pair(family(name), replicas=3)
    for examples, length in ((4, 6), (1, 7), (3, 4), (2, 12)):
        assert gap(found, batch_for(name, examples, length), fzoo(4, 0.1)) < EXACT


SEEDS = [Displacement(1, 0, 1e-2), Displacement(2, 0, 1e-2), None, *fzoo(3), Displacement(2**64 - 1, 5, -0.02)]
PLACES: dict[str, list[Place]] = {
    "fzoo": fzoo(8),
    "mezo": mezo(3),
    "one": [Displacement(3, 2, 1e-2)],
    "clean ones among others": [Displacement(3, 1, 1e-2), None, Displacement(3, 0, -1e-2), None],
    "several seeds": SEEDS,
    "the same twice": [None, Displacement(3, 1, 1e-2), Displacement(3, 1, 1e-2)],
    "several radii": [Displacement(3, 1, 1e-3), Displacement(3, 1, 1e-2), Displacement(3, 1, 0.1)],
}


@Structure
@pytest.mark.parametrize("replicas", [None, 1, 2, 3])
@pytest.mark.parametrize("places", PLACES)
def test_places(places: str, replicas: int | None, structure: NoiseStructure) -> None:
    found = pair(family("qwen3"), per_example, structure, replicas=replicas)
    assert gap(found, batch_for("qwen3"), PLACES[places]) < EXACT


@pytest.mark.parametrize("examples", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("length", [4, 8, 12])
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta-mlm", "gemma3"])
def test_shapes_whose_axes_collide(name: str, examples: int, length: int) -> None:
    # Four places: lengths, widths and examples that are multiples of each other.
    batch = batch_for(name, examples, length)
    assert gap(pair(family(name)), batch, fzoo(3)) < EXACT


def adapted(config: str, **options: Any) -> nn.Module:
    import peft

    model: nn.Module = peft.get_peft_model(family("llama"), getattr(peft, config)(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        # Adapters start as the identity, under which parts of a direction have no effect.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


PROJECTIONS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: adapted("LoraConfig", r=4, **PROJECTIONS),
    "rslora with biases": lambda: adapted("LoraConfig", r=4, use_rslora=True, lora_bias=True, **PROJECTIONS),
    "dora": lambda: adapted("LoraConfig", r=4, use_dora=True, **PROJECTIONS),
    "lora on embeddings": lambda: adapted("LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"]),
    "ia3": lambda: adapted("IA3Config", feedforward_modules=["down_proj"], **PROJECTIONS),
    "prompt tuning": lambda: adapted("PromptTuningConfig", num_virtual_tokens=3),
    "p-tuning": lambda: adapted("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": lambda: adapted("PrefixTuningConfig", num_virtual_tokens=3),
}


# Each with its loss function: prefix tuning is right with the model's logits.
ADAPTED = {
    f"{name}, {loss.__name__}": (build, loss) for name, build in ADAPTERS.items() for loss in (model_loss, per_example)
}


@Structure
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str, structure: NoiseStructure) -> None:
    build, loss_fn = ADAPTED[name]
    found = pair(build(), loss_fn, structure)
    assert all(p.requires_grad for p in found.infos)
    assert len(found.infos) < len(list(found.model.parameters()))
    for _ in range(2):
        assert gap(found, batch_for("llama"), fzoo(4, 0.05)) < EXACT


@Structure
@pytest.mark.parametrize("name", ["opt-125m", "bert-classes", "gpt2", "neox"])
@pytest.mark.parametrize("part", ["biases", "all but embeddings", "embeddings", "last block"])
def test_frozen_parameters(part: str, name: str, structure: NoiseStructure) -> None:
    model = family(name)
    chosen: dict[str, Callable[[str], bool]] = {
        "biases": lambda n: n.endswith("bias"),
        "all but embeddings": lambda n: not any(key in n for key in ("embed", "wte", "wpe")),
        "embeddings": lambda n: any(key in n for key in ("embed", "wte", "wpe")),
        "last block": lambda n: ".1." in n,
    }
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen[part](parameter_name))
    assert gap(pair(model, per_example, structure), batch_for(name), fzoo(4)) < EXACT


@Structure
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "opt-350m", "roberta-mlm", "gpt2", "gemma3", "phi"])
def test_16_bits(name: str, dtype: torch.dtype, structure: NoiseStructure) -> None:
    # Roundings differ (rank-1 terms are added to products), so that only the size of the gap can be tested.
    found = pair(family(name, dtype), per_example, structure, autocast=dtype)
    batched, sequential = (e.losses(batch_for(name), fzoo(4)) for e in (found.batched, found.sequential))
    assert (batched - sequential).abs().max() < (3e-2 if dtype == torch.bfloat16 else 6e-3)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3", "mixtral"])
def test_roundings_of_16_bits_are_not_taken_for_errors(name: str) -> None:
    for eps in (3e-4, 1e-2):
        for structure in NoiseStructure:
            found = pair(family(name, torch.bfloat16), per_example, structure, torch.bfloat16)
            found.batched.losses(batch_for(name, 32, 16), fzoo(24, eps))
            found = pair(family(name, torch.bfloat16), per_example, structure, torch.bfloat16)
            found.batched.losses(batch_for(name), fzoo(4, eps))


@Structure
@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-5)], ids=["bf16", "fp16"])
def test_small_radius_survives_16_bits(dtype: torch.dtype, eps: float, structure: NoiseStructure) -> None:
    # One layer, many outputs: in a deep tiny model the rounding of activations drowns the difference (0.45 at best).
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).double().pow(2).mean(1)

    torch.manual_seed(2)
    layer, x = nn.Linear(128, 128, bias=False).to(dtype), torch.randn(2048, 128)
    low, wide = pair(copy.deepcopy(layer), loss_fn, structure, dtype), pair(layer.float(), loss_fn, structure)
    differences = []
    for evaluator in (wide.sequential, low.batched, low.sequential):
        losses = evaluator.losses(x, fzoo(48, eps)).mean(1)
        differences.append(losses[1:] - losses[0])
    batched, copies = torch.corrcoef(torch.stack(differences))[0, 1:].tolist()
    assert batched > 0.85
    assert copies < 0.7
