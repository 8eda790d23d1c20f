"""Weights that stay on the device beside offloaded ones, as the planner decides it; on a CPU the device is the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zo_ds
from tests.conftest import tiny_model, zo_batch
from zo_ds.engine.engine import ZOEngine
from zo_ds.errors import ConfigError
from zo_ds.planning.budget import plan
from zo_ds.planning.hardware import Hardware
from zo_ds.planning.placement import Placement
from zo_ds.planning.shapes import ModelShapes

CARD = Hardware("a small card", 2**20, 1e11, 1e12, 1e10, 2**30, 1e10, 1e9, 1e9)


def placement(offload: str = "cpu", kib: int = 29) -> Placement:
    how: dict[str, Any] = {"offload": offload, "device_budget_bytes": kib * 2**10, "dtype_bytes": 4}
    return plan(ModelShapes.of(tiny_model("llama")), CARD, num_directions=4, examples=1, tokens=4, **how)


def open_engine(offload: str, folder: Path, chosen: Placement | None = None, small: int = 0) -> ZOEngine:
    device = {"device": offload, **({"nvme_path": str(folder / "disk")} if offload == "nvme" else {})}
    told = {"stage": 3, "offload_param": device, "stage3_param_persistence_threshold": small}
    zero = told if offload != "none" else {"stage": 0}
    config = {"zero_optimization": zero, "zeroth_order": {"num_directions": 4, "lr": 5e-3, "weight_decay": 0.1}}
    return zo_ds.initialize(tiny_model("llama"), config, placement=chosen)


def test_some_units_stay_and_some_do_not() -> None:
    chosen = placement()
    names = {name for name, _ in tiny_model("llama").named_parameters()}
    assert 0 < len(chosen.resident_parameters) < len(names)
    assert set(chosen.resident_parameters) < names


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_where_weights_are_changes_no_bit(offload: str, tmp_path: Path) -> None:
    alone, split = open_engine("none", tmp_path), open_engine(offload, tmp_path, placement(offload))
    for step in range(5):
        batch = zo_batch(seed=step)
        assert torch.equal(alone.step(batch).coefficients, split.step(batch).coefficients)
    assert alone.digest() == split.digest()
    assert alone.store.state_hash() == split.store.state_hash()


def test_what_stays_is_not_on_disk(tmp_path: Path) -> None:
    chosen = placement("nvme")
    engine = open_engine("nvme", tmp_path, chosen)
    for step in range(3):
        out = engine.step(zo_batch(seed=step))
    sizes = {name: p.ds_numel * 4 for name, p in engine.module.named_parameters()}  # type: ignore[attr-defined]
    away = sum(size for name, size in sizes.items() if name not in chosen.resident_parameters)
    assert 0 < out.traffic.disk_written <= away < sum(sizes.values())


def test_small_parameters_are_never_fetched(tmp_path: Path) -> None:
    """DeepSpeed itself would keep gathered copies, which go stale."""
    alone, kept = open_engine("none", tmp_path), open_engine("nvme", tmp_path, small=100)
    sizes = [p.ds_numel for p in kept.module.parameters()]  # type: ignore[attr-defined]
    assert min(sizes) <= 100 < max(sizes)
    for step in range(6):
        out = kept.step(zo_batch(seed=step))
        assert torch.equal(alone.step(zo_batch(seed=step)).coefficients, out.coefficients)
    assert alone.digest() == kept.digest()
    assert out.traffic.disk_written <= 4 * sum(size for size in sizes if size > 100)
    assert kept.deepspeed._config.zero_config.param_persistence_threshold == 0


def test_deepspeed_is_told_what_was_planned_unless_the_user_said_otherwise(tmp_path: Path) -> None:
    chosen = placement()
    engine = open_engine("cpu", tmp_path, chosen)
    wanted = chosen.settings()
    zero: Any = engine.deepspeed._config.zero_config
    assert zero.prefetch_bucket_size == wanted["stage3_prefetch_bucket_size"]
    assert zero.max_live_parameters == wanted["stage3_max_live_parameters"]
    config = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 12345},
        "zeroth_order": {"num_directions": 4},
    }
    engine = zo_ds.initialize(tiny_model("llama"), config, placement=chosen)
    zero = engine.deepspeed._config.zero_config
    assert zero.max_live_parameters == 12345


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="not fit"):
        placement(kib=20)
