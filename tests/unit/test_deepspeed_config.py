"""What DeepSpeed gets to see: no "auto", nothing that a forward-only run cannot honour."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from zo_ds.config.deepspeed import read_deepspeed, resolve_deepspeed
from zo_ds.errors import ConfigError

AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": "auto",
    "scheduler": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": "auto",
        "stage3_max_reuse_distance": "auto",
        "stage3_param_persistence_threshold": "auto",
        "reduce_bucket_size": "auto",
    },
}


def resolve(tree: dict[str, Any], batch: int | None = 16, micro: int | None = 4, world: int = 2) -> dict[str, Any]:
    return resolve_deepspeed(tree, batch_size=batch, micro_batch_size=micro, world_size=world)


def refused(tree: dict[str, Any], **sizes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve(tree, **sizes)
    return caught.value


def zero(**entries: Any) -> dict[str, Any]:
    return {"zero_optimization": entries}


def test_every_auto_is_resolved() -> None:
    assert resolve(AUTO) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 500_000_000,
            "memory_efficient_linear": False,
        },
    }


def test_input_is_not_mutated() -> None:
    tree = copy.deepcopy(AUTO)
    resolved = resolve(tree)
    resolved["zero_optimization"]["offload_param"]["device"] = "changed"
    assert tree == AUTO


def test_deepspeed_sees_nothing_of_zo_ds() -> None:
    resolved = resolve({"zeroth_order": {"lr": "auto"}, "bf16": {"enabled": True}, "bfloat16": {}, "fp16": {}})
    assert resolved.keys().isdisjoint({"zeroth_order", "bf16", "bfloat16", "fp16"})


@pytest.mark.parametrize("tree", [{}, {"zero_optimization": {}}, {"zero_optimization": None}, zero(stage=0)])
def test_stage_0_is_the_default_and_says_nothing_else(tree: dict[str, Any]) -> None:
    assert resolve(tree)["zero_optimization"] == {"stage": 0}


def test_stage_3_is_forced_to_keep_no_stale_weights() -> None:
    plain = resolve(zero(stage=3))["zero_optimization"]
    assert (plain["stage3_param_persistence_threshold"], plain["memory_efficient_linear"]) == (0, False)
    assert (plain["stage3_prefetch_bucket_size"], plain["stage3_max_reuse_distance"]) == (0, 0)
    own = resolve(zero(stage=3, stage3_max_live_parameters=7, stage3_prefetch_bucket_size=9))["zero_optimization"]
    assert (own["stage3_max_live_parameters"], own["stage3_prefetch_bucket_size"]) == (7, 9)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_for_optimizer_states_are_refused_with_the_reason(stage: int) -> None:
    error = refused(zero(stage=stage))
    assert error.what == f"ZeRO stage {stage} is refused"
    assert error.where == "deepspeed.zero_optimization.stage"
    assert "gradients" in error.why
    assert "stage 0" in error.remedy
    assert "stage 3" in error.remedy


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        (zero(stage=4), "zero_optimization.stage"),
        (zero(stage="auto"), "zero_optimization.stage"),
        (zero(stage=0, offload_param={"device": "cpu"}), "zero_optimization.offload_param"),
        (zero(offload_param={"device": "cpu"}), "zero_optimization.offload_param"),
        (zero(stage=3, offload_param={"device": "tape"}), "zero_optimization.offload_param.device"),
        (zero(stage=3, offload_param={"device": "nvme"}), "zero_optimization.offload_param.nvme_path"),
        (zero(stage=3, offload_param={"device": "auto"}), "zero_optimization.offload_param.device"),
        (zero(stage=3, offload_optimizer={"device": "cpu"}), "zero_optimization.offload_optimizer"),
        (zero(stage=3, memory_efficient_linear=True), "zero_optimization.memory_efficient_linear"),
        (zero(stage=3, stage3_param_persistence_threshold=-1), "zero_optimization.stage3_param_persistence_threshold"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"prescale_gradients": True}, "prescale_gradients"),
    ],
)
def test_what_cannot_work_is_refused_by_its_path(tree: dict[str, Any], where: str) -> None:
    error = refused(tree)
    assert error.where == f"deepspeed.{where}"
    assert error.remedy


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "gradient_clipping", "prescale_gradients"])
@pytest.mark.parametrize("value", ["auto", None, {}, 0, 0.0, False])
def test_empty_optimizer_entries_of_a_shared_file_are_dropped(key: str, value: Any) -> None:
    assert key not in resolve({key: value})


@pytest.mark.parametrize(
    ("tree", "sizes", "expected"),
    [
        ({}, {}, (4, 2)),
        ({}, {"batch": None, "micro": None}, (1, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, {"batch": None, "micro": None}, (4, 1)),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4},
            {"batch": None, "micro": None},
            (4, 4),
        ),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}, {}, (4, 2)),
        ({}, {"world": 1}, (4, 4)),
        ({}, {"world": 3}, (4, 2)),
    ],
)
def test_batch_sizes_are_those_of_one_rank(
    tree: dict[str, Any], sizes: dict[str, Any], expected: tuple[int, int]
) -> None:
    config = resolve(tree, **sizes)
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(config[name] for name in names) == expected
    assert "train_batch_size" not in config  # DeepSpeed's world is not the job


@pytest.mark.parametrize(
    ("tree", "key", "text"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "8 contradicts training.batch_size, which is 16"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu",
            "2 contradicts training.micro_batch_size, which is 4",
        ),
        (
            {"train_batch_size": 16, "gradient_accumulation_steps": 3},
            "gradient_accumulation_steps",
            "3 contradicts units of work of a rank, which is 2",
        ),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps", "3 contradicts"),
    ],
)
def test_contradiction_of_the_recipe(tree: dict[str, Any], key: str, text: str) -> None:
    error = refused(tree)
    assert error.where == f"deepspeed.{key}"
    assert text in error.what
    assert "auto" in error.remedy


@pytest.mark.parametrize("value", [0, -4, 2.5, "16", [4]])
def test_sizes_are_positive_integers(value: Any) -> None:
    assert "must be a positive integer" in refused({"train_batch_size": value}).what


def test_a_batch_that_is_not_made_of_units() -> None:
    sizes = {"batch": None, "micro": None}
    error = refused({"train_batch_size": 18, "train_micro_batch_size_per_gpu": 4}, **sizes)
    assert error.what == "a batch of 18 cannot be made of units of 4"
    assert "same shape" in error.why
    assert "multiple of 4" in error.remedy
    assert resolve({}, batch=24, world=3)["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"steps_per_print": "auto"}, "deepspeed.steps_per_print"),
        (zero(stage=3, sub_group_size="auto"), "deepspeed.zero_optimization.sub_group_size"),
        (zero(stage=3, offload_param={"device": "cpu", "pin_memory": "auto"}), "offload_param.pin_memory"),
        ({"x": [{"y": 1}, {"y": "auto"}]}, "deepspeed.x[1].y"),
    ],
)
def test_unknown_auto_is_refused_with_its_path(tree: dict[str, Any], path: str) -> None:
    error = refused(tree)
    assert error.where.endswith(path)
    assert error.where in error.what


@pytest.mark.parametrize(
    "tree", [{"zero_optimization": True}, {"zero_optimization": "auto"}, zero(stage=3, offload_param="cpu")]
)
def test_a_value_where_a_block_belongs_is_refused(tree: dict[str, Any]) -> None:
    refused(tree)


def test_read_gives_a_copy_of_a_mapping_and_the_content_of_a_file(tmp_path: Path) -> None:
    inline = read_deepspeed(AUTO)
    inline["zero_optimization"]["stage"] = 0
    assert AUTO["zero_optimization"]["stage"] == 3
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTO))
    assert read_deepspeed(path) == read_deepspeed(str(path)) == AUTO


@pytest.mark.parametrize(
    ("text", "what"), [(None, "cannot read"), ("{", "not JSON"), ("[]", "a JSON object"), ("\ufeff{", "not JSON")]
)
def test_unreadable_file(tmp_path: Path, text: str | None, what: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=what) as caught:
        read_deepspeed(path)
    assert caught.value.where == str(path)
