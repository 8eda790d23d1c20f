"""The planner: shapes against the model's own parameters, plans against a step of the real code on the meta device."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from zo_ds.config.deepspeed import resolve_deepspeed
from zo_ds.errors import ConfigError, DataError
from zo_ds.forward import joining
from zo_ds.maths.directions import NoiseStructure
from zo_ds.models.shapes import KNOWN, meta_model
from zo_ds.planning.budget import plan
from zo_ds.planning.hardware import ALIASES, PRESETS, Hardware, measure, preset
from zo_ds.planning.placement import Placement
from zo_ds.planning.shapes import ModelShapes, blocks_of

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SMALL = {"vocab_size": 2000, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
BUILDS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 1024, "word_embed_proj_dim": 256, "max_position_embeddings": 128, "pad_token_id": 1},
    "llama": {"intermediate_size": 704, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "phi": {"intermediate_size": 1024},
    "gpt2": {"n_inner": 1024, "n_positions": 128},
    "qwen3": {"intermediate_size": 704, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
}
PUBLISHED = {  # parameters in billions, as in the models' names and papers
    "opt-125m": 0.125,
    "opt-350m": 0.331,
    "opt-1.3b": 1.316,
    "opt-2.7b": 2.65,
    "opt-6.7b": 6.66,
    "opt-13b": 12.85,
    "opt-30b": 29.97,
    "opt-66b": 65.7,
    "opt-175b": 174.6,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "phi-2": 2.78,
}
CARD = Hardware("a card", 10**9, 100e9, 1e12, 1e9, 10**11, 50e9, 1e9, 0.5e9, host_cores=4)


def small(kind: str, dtype: torch.dtype = torch.bfloat16, **changes: int) -> nn.Module:
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **{**SMALL, **BUILDS[kind], **changes})
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def card(**changes: Any) -> Hardware:
    return CARD.overridden([f"{key}={value}" for key, value in changes.items()])


def small_plan(shapes: ModelShapes, hardware: Hardware = CARD, **options: Any) -> Placement:
    return plan(shapes, hardware, **{"num_directions": 8, "examples": 2, "tokens": 32, **options})


def half(shapes: ModelShapes, size: int = 2, **options: Any) -> int:
    """Bytes of a device that holds about half of the layers."""
    whole = small_plan(shapes, dtype_bytes=size, **options)
    return int((whole.device_bytes - whole.device["reserve"] - shapes.bytes(size) // 2) / 0.97)


@pytest.fixture
def prover(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "meter", raising=False)
    import prove

    return prove


@pytest.mark.parametrize("kind", BUILDS)
def test_shapes_are_those_of_the_parameters(kind: str) -> None:
    model = small(kind)
    shapes = ModelShapes.of(model)
    parameters = dict(model.named_parameters())  # tied ones once
    assert sorted(name for unit in shapes.units for name in unit.parameters) == sorted(parameters)
    assert shapes.elements == sum(p.numel() for p in parameters.values())
    assert shapes.bytes(2) == sum(p.numel() * (2 if p.dim() >= 2 else 4) for p in parameters.values())
    assert shapes.trained_bytes(2) == shapes.bytes(2)
    assert shapes.largest_elements == max(p.numel() for p in parameters.values())
    assert sum(unit.is_block for unit in shapes.units) == 8
    assert len(shapes.order) == sum(unit.uses for unit in shapes.units)
    assert shapes.hidden == 256
    assert shapes.vocabulary == 2000
    assert shapes.head_products == 2000 * 256


def test_a_tied_embedding_is_one_unit_with_two_uses() -> None:
    tied = ModelShapes.of(small("opt"))
    assert [unit.uses for unit in tied.units if "embed_tokens" in unit.name] == [2]
    assert "lm_head" not in [unit.name for unit in tied.units]
    apart = ModelShapes.of(small("llama"))
    assert {unit.uses for unit in apart.units} == {1}
    assert apart.wide_alive == 3
    assert (tied.wide_alive, tied.widest, tied.tables) == (2, 1024, 2)


def test_frozen_weights_are_fetched_but_not_trained() -> None:
    model = small("opt").requires_grad_(False)
    bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
    bias.requires_grad_(True)
    shapes = ModelShapes.of(model)
    assert shapes.trained_bytes(2) == 4 * bias.numel()
    assert not shapes.trained_layer_products
    placement = small_plan(shapes)
    assert placement.traffic.device == 2 * 4 * bias.numel()


def test_a_model_without_layers_has_a_unit_for_each_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    shapes = ModelShapes.of(model)
    assert blocks_of(model) == []
    assert [unit.name for unit in shapes.units] == ["0", "2"]
    assert small_plan(shapes).resident_fraction == 1


def test_known_models_have_their_published_sizes() -> None:
    assert PUBLISHED.keys() == KNOWN.keys()
    for name in ("opt-125m", "opt-350m", "opt-13b", "opt-175b", "llama-3-70b", "phi-2"):
        elements = ModelShapes.of(meta_model(name)).elements
        assert elements == pytest.approx(PUBLISHED[name] * 1e9, rel=0.005), name
    with pytest.raises(DataError, match="no such model"):
        meta_model("opt-7b")


def test_a_folder_is_read_without_its_weights(tmp_path: Path) -> None:
    AutoConfig.for_model("opt", **SMALL, **BUILDS["opt"]).save_pretrained(tmp_path)
    assert ModelShapes.of(meta_model(str(tmp_path))) == ModelShapes.of(small("opt"))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("opt", torch.bfloat16), ("opt", torch.float32), ("llama", torch.bfloat16), ("phi", torch.bfloat16)],
)
def test_a_real_step_allocates_what_was_planned(prover: ModuleType, kind: str, dtype: torch.dtype) -> None:
    model = small(kind, dtype, num_hidden_layers=5)
    shapes = ModelShapes.of(model)
    size = dtype.itemsize
    work = {"num_directions": 2, "examples": 2, "tokens": 64, "labelled": 2}
    placement = small_plan(shapes, dtype_bytes=size, device_budget_bytes=half(shapes, size, **work), **work)
    assert 0 < placement.resident_fraction < 1
    proof = prover.prove(model, placement, examples=2, tokens=64, labelled=2, dtype=dtype)
    planned = placement.device_bytes - placement.device["reserve"]
    assert 0.9 * planned <= proof.peak <= planned
    weights = sum(placement.device[part] for part in ("resident", "streamed", "buffers"))
    assert 0.9 * weights <= proof.highest["weights"] <= weights
    assert proof.steady <= proof.peak


def test_a_proof_sees_what_does_not_fit(prover: ModuleType) -> None:
    model = small("opt", num_hidden_layers=2)
    placement = small_plan(ModelShapes.of(model), num_directions=1)
    proof = prover.prove(model, placement, examples=2, tokens=256, steps=1)
    assert proof.peak > placement.device_bytes - placement.device["reserve"]


def test_everything_stays_if_it_fits() -> None:
    shapes = ModelShapes.of(small("opt"))
    placement = small_plan(shapes)
    assert placement.resident_fraction == 1
    assert placement.resident_units == tuple(unit.name for unit in shapes.units)
    assert (placement.host_bytes, placement.traffic.link, placement.device["streamed"]) == (0, 0, 0)
    assert placement.traffic.scalars == 16 * 9 + 48
    assert placement.seconds.update == 0


def test_more_memory_never_makes_it_worse() -> None:
    shapes = ModelShapes.of(meta_model("opt-13b"))
    least = 9 * 10**9
    found = [
        plan(shapes, preset("24gb"), num_directions=8, examples=4, tokens=64, device_budget_bytes=least + i * 10**9)
        for i in range(22)
    ]
    for smaller, larger in pairwise(found):
        # A layer ahead may cost a tenth of the time of a matrix ahead.
        assert larger.seconds.step <= 1.1 * smaller.seconds.step
        if larger.prefetch_elements == smaller.prefetch_elements:
            assert larger.resident_fraction >= smaller.resident_fraction
            assert larger.seconds.step <= smaller.seconds.step
    assert found[0].resident_fraction < 0.5
    assert found[-1].resident_fraction == 1


def test_replicas_and_passes_follow_the_budget_of_activations() -> None:
    shapes = ModelShapes.of(small("opt"))
    largest = 2 * 32 * 1024 * 2  # examples x tokens x widest x bytes
    budgets = {9: 4 * 9 * largest, 3: 4 * 3 * largest + 1, 1: 1}
    for places, budget in budgets.items():
        placement = small_plan(shapes, activation_budget_bytes=budget)
        assert placement.replicas_per_pass == places == min(9, joining.PassSize(None, budget).for_activations(largest))
        assert placement.passes == -(-9 // places)
    tight = {"device_budget_bytes": half(shapes)}
    one, three = (small_plan(shapes, replicas_per_pass=n, **tight) for n in (9, 3))
    assert (one.passes, three.passes) == (1, 3)
    assert one.traffic.link == shapes.bytes(2) - one.device["resident"]
    assert three.traffic.link == 3 * (shapes.bytes(2) - three.device["resident"])
    assert small_plan(shapes, micro_batches=2, **tight).traffic.link == 2 * one.traffic.link


def test_offload_none_keeps_all_or_refuses() -> None:
    shapes = ModelShapes.of(small("opt"))
    assert small_plan(shapes, offload="none").resident_fraction == 1
    with pytest.raises(ConfigError, match="the weights do not fit the device") as error:
        small_plan(shapes, offload="none", device_budget_bytes=half(shapes))
    assert "offload to cpu or nvme" in error.value.remedy
    assert "a card" in error.value.where
    shared = small_plan(shapes, card(ranks=4), offload="none", shard_size=4, device_budget_bytes=half(shapes))
    assert shared.resident_fraction < 1
    assert shared.device["shards"] > 0
    assert (shared.traffic.link, shared.host_bytes) == (0, 0)
    assert shared.traffic.gathers > 0


def test_when_nothing_fits_the_error_says_what_is_missing() -> None:
    shapes = ModelShapes.of(meta_model("opt-66b"))
    with pytest.raises(ConfigError) as error:
        plan(shapes, preset("12gb"), num_directions=8, examples=4, tokens=64, device_budget_bytes=4 * 10**9)
    text = str(error.value)
    assert "even one layer at a time does not fit the device" in text
    assert all(part in text for part in ("RTX 3060", "budget 4.00 GB", "activations", "scratch", "reserve", "do:"))
    with pytest.raises(ConfigError, match="do not fit the node's memory") as error:
        plan(shapes, preset("24gb").overridden(["ranks=8"]), num_directions=8, examples=4, tokens=64)
    assert "nvme" in error.value.remedy
    with pytest.raises(ConfigError, match="no size"):
        small_plan(shapes, examples=0)


@pytest.mark.parametrize("name", list(ALIASES))
def test_66b_fits_every_card(name: str) -> None:
    placement = plan(ModelShapes.of(meta_model("opt-66b")), preset(name), num_directions=8, examples=4, tokens=64)
    assert placement.device_bytes <= PRESETS[ALIASES[name]].device_bytes
    assert placement.prefetch_units >= 1
    assert placement.host_bytes + placement.device["resident"] == ModelShapes.of(meta_model("opt-66b")).bytes(2)
    assert placement.seconds.step >= max(placement.seconds.device, placement.seconds.link)
    table = placement.table()
    assert f"of {name.removesuffix('gb')}.00 GB" in table
    assert f"bound by {placement.seconds.bound}" in table
    assert "192 bytes" in table


def test_settings_are_what_deepspeed_takes() -> None:
    placement = plan(ModelShapes.of(meta_model("opt-66b")), preset("24gb"), num_directions=8, examples=4, tokens=64)
    settings = placement.settings()
    assert all(type(value) is int for value in settings.values())
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, **settings}
    resolved = resolve_deepspeed({"zero_optimization": zero}, batch_size=4, micro_batch_size=4, world_size=1)
    assert settings.items() <= resolved["zero_optimization"].items()
    layer = 12 * 9216**2
    assert layer <= settings["stage3_prefetch_bucket_size"] < 1.01 * layer
    assert settings["stage3_max_live_parameters"] >= layer


def test_disk_is_read_only_if_memory_does_not_cache_it() -> None:
    shapes = ModelShapes.of(small("opt"))
    tight = {"device_budget_bytes": half(shapes), "offload": "nvme"}
    cached = small_plan(shapes, **tight)
    assert cached.traffic.disk_read == 0
    assert cached.traffic.disk_write == cached.disk_bytes > 0
    crowded = small_plan(shapes, card(host_bytes=cached.disk_bytes), **tight)
    assert crowded.traffic.disk_read == crowded.traffic.link
    assert crowded.seconds.bound == "disk"
    assert "on disk" in crowded.table()


def test_factored_noise_writes_no_copies() -> None:
    shapes = ModelShapes.of(small("opt"))
    dense, factored, gaussian = (small_plan(shapes, noise=noise) for noise in NoiseStructure)
    assert gaussian.traffic == dense.traffic
    assert dense.traffic.device - factored.traffic.device == 3 * 8 * 2 * (shapes.layer_products + shapes.head_products)


def test_gaussian_noise_costs_the_host_more() -> None:
    shapes, busy = ModelShapes.of(small("opt")), card(host_cores=1, host_bytes_per_s=1e12)
    away = {"offload": "cpu", "device_budget_bytes": half(shapes)}
    dense, _, gaussian = (small_plan(shapes, busy, noise=noise, **away) for noise in NoiseStructure)
    assert gaussian.seconds.update > 2 * dense.seconds.update > 0


def test_hardware_is_overridden_and_refuses_nonsense() -> None:
    changed = preset("24gb").overridden(["link_bytes_per_s=12e9", "ranks=2"])
    assert (changed.link_bytes_per_s, changed.ranks) == (12e9, 2)
    assert type(changed.ranks) is int
    with pytest.raises(ConfigError, match="no property of a machine") as error:
        changed.overridden(["link_bytes=1"])
    assert "link_bytes_per_s" in error.value.remedy
    for text in ("ranks=two", "ranks=0", "host_bytes=inf"):
        with pytest.raises(ConfigError, match="not a positive number"):
            changed.overridden([text])
    with pytest.raises(ConfigError, match="no preset"):
        preset("7gb")


def test_this_machine_is_measured() -> None:
    here = measure()
    assert here.host_bytes <= psutil.virtual_memory().total
    rates = (here.flops_per_s, here.host_bytes_per_s, here.link_bytes_per_s, here.device_bytes_per_s)
    assert min(rates) > 1e8
    assert here.shared_memory != torch.cuda.is_available()


def test_a_processor_shares_its_memory_with_the_host() -> None:
    shapes = ModelShapes.of(meta_model("opt-6.7b"))
    options: dict[str, Any] = {"num_directions": 8, "examples": 1, "tokens": 32, "dtype_bytes": 4}
    with pytest.raises(ConfigError, match="node's memory"):
        plan(shapes, preset("cpu-2core"), device_budget_bytes=8 * 10**9, **options)
    placement = plan(shapes, preset("cpu-2core"), device_budget_bytes=8 * 10**9, offload="nvme", **options)
    assert placement.traffic.disk_read > 0
