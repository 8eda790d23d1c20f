"""From a model and a configuration to an engine: every form of configuration, every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_ds
from tests.conftest import STORES, tiny_model, weights_of, zo_batch
from zo_ds.config.load import validate
from zo_ds.engine.engine import ZOEngine
from zo_ds.errors import ConfigError
from zo_ds.maths.directions import Site
from zo_ds.maths.noise import param_id
from zo_ds.ops import api as ops

SETTINGS = {"lr": 5e-3, "run_seed": 3, "num_directions": 4}


def mean_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().pow(2).mean(1)


def open_plain(model: nn.Module, **config: Any) -> ZOEngine:
    return zo_ds.initialize(model, {"zeroth_order": SETTINGS, **config}, loss_fn=mean_loss)


def dtypes(engine: ZOEngine) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in engine.store.views()}


def test_a_path_a_mapping_or_a_recipe(tmp_path: Path) -> None:
    block = {"zeroth_order": SETTINGS, "train_micro_batch_size_per_gpu": "auto"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(block))
    recipe = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "training": {"steps": 7},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "zeroth_order": {**SETTINGS, "lr_schedule": "linear", "final_ratio": 1.0},
    }
    digests = set()
    for config in (path, str(path), block, validate(zo_ds.ZOConfig, recipe, where="here")):
        engine = zo_ds.initialize(tiny_model("llama"), config)
        assert engine.step(zo_batch()).skip is None
        digests.add(engine.digest())
    assert len(digests) == 1
    assert engine.config.total_steps == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "has no 'zeroth_order' block"),
        ({"zeroth_order": {"learning_rate": 1}}, "unknown key 'learning_rate'"),
        ({"zeroth_order": {"lr_schedule": "cosine"}}, "a decaying schedule needs the length of the run"),
        ({"zeroth_order": {"eps_schedule": "linear"}}, "a decaying schedule needs the length of the run"),
        ({"zeroth_order": {}, "zero_optimization": {"stage": 2}}, "ZeRO stage 2 is refused"),
        ({"zeroth_order": {}, "optimizer": {"type": "Adam"}}, "'optimizer' cannot be used"),
        ({"zeroth_order": {}, "bf16": True}, "bf16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zo_ds.initialize(nn.Linear(2, 2), config)


def test_a_schedule_with_the_length_of_the_run() -> None:
    settings = {**SETTINGS, "lr_schedule": "cosine", "total_steps": 3, "final_ratio": 0.0, "warmup_steps": 1}
    engine = zo_ds.initialize(nn.Linear(4, 2), {"zeroth_order": settings}, loss_fn=mean_loss)
    lrs = [engine.step(torch.ones(2, 4)).lr for _ in range(4)]
    assert lrs == [2.5e-3, 5e-3, 0.0, 0.0]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_16_bit_matrices_and_fp32_vectors(key: str, dtype: torch.dtype, store: str) -> None:
    config = {"zeroth_order": SETTINGS, key: {"enabled": True}, "zero_optimization": STORES[store]}
    engine = zo_ds.initialize(tiny_model("gpt2"), config)
    held = weights_of(engine)
    assert {(tensor.dim() > 1, tensor.dtype) for tensor in held.values()} == {(True, dtype), (False, torch.float32)}
    wanted = tiny_model("gpt2").state_dict()
    assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in held.items())
    for step in range(3):
        assert engine.step(zo_batch(seed=step)).skip is None
    changed = {name for name, tensor in engine.store.views() if not torch.equal(tensor, held[name])}
    assert changed == held.keys()


@pytest.mark.parametrize("value", [{"enabled": False}, {"enabled": "auto"}, {}, None])
def test_16_bit_switched_off_keeps_the_models_dtype(value: Any) -> None:
    assert set(dtypes(open_plain(nn.Linear(4, 4), bf16=value)).values()) == {torch.float32}
    assert dtypes(open_plain(nn.Linear(4, 4).bfloat16(), bf16=value))["weight"] == torch.bfloat16


@pytest.mark.parametrize("store", STORES)
def test_vectors_alone_of_a_16_bit_model(store: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    engine = open_plain(model, zero_optimization=STORES[store])
    before = engine.digest()
    assert engine.step(torch.ones(3, 4)).skip is None
    assert engine.digest() != before


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Transposed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight.data = self.weight.data.t()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", [Scaled, Transposed])
def test_parameters_that_deepspeed_cannot_broadcast(kind: type[nn.Module], store: str) -> None:
    torch.manual_seed(0)
    try:
        engine = open_plain(kind(), zero_optimization=STORES[store])
    except ConfigError as error:
        assert error.where in ("scale", "weight")  # noqa: PT017  # refusing by name is as good as working
        return
    assert engine.step(torch.ones(3, 4)).skip is None


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_trains_and_perturbs_nothing_but_the_adapters(
    store: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama", dtype=dtype)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    engine = zo_ds.initialize(
        get_peft_model(base, lora), {"zeroth_order": {**SETTINGS, "lr": 0.1}, "zero_optimization": STORES[store]}
    )
    names = [info.name for info in engine.store.parameters.values()]
    assert len(names) == 8
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    before = weights_of(engine)
    displaced: set[int] = set()
    perturb = ops.perturb

    def look(theta: Tensor, site: Site, *args: Any, **options: Any) -> Tensor:
        displaced.add(site.param_id)
        return perturb(theta, site, *args, **options)

    monkeypatch.setattr(ops, "perturb", look)
    for step in range(3):
        assert engine.step(zo_batch(seed=step)).skip is None
    changed = {name for name, tensor in engine.store.views() if not torch.equal(tensor, before[name])}
    assert changed == set(names)
    assert displaced == {param_id(name) for name in names}
