"""A run goes on with the same mathematics or not at all: every key is either free, a matter of rounding, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from zo_ds.config.identity import FREE, ROUNDING, differences
from zo_ds.config.load import all_keys
from zo_ds.config.schema import ZOConfig

CONFIG = ZOConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "training": {"steps": 10}})
LEAVES = [key for key in all_keys(ZOConfig) if not any(other.startswith(f"{key}.") for other in all_keys(ZOConfig))]
TREE = CONFIG.model_dump(mode="json")
MATHEMATICS = """
model.revision model.dtype model.head
peft.method peft.r peft.alpha peft.target_modules peft.virtual_tokens peft.start peft.start_text peft.seed
data.splits data.shots data.text_field data.label_field data.max_length data.train_examples data.balanced
data.group_by_length data.seed
task.name task.template task.label_words task.objective task.reward task.length_normalised task.max_new_tokens
method
zeroth_order.estimator zeroth_order.num_directions zeroth_order.baseline zeroth_order.momentum
zeroth_order.momentum_window zeroth_order.eps zeroth_order.lr zeroth_order.lr_schedule zeroth_order.eps_schedule
zeroth_order.warmup_steps zeroth_order.final_ratio zeroth_order.total_steps zeroth_order.weight_decay
zeroth_order.noise zeroth_order.spread_std zeroth_order.spread_floor zeroth_order.coefficient_cap
zeroth_order.run_seed
training.batch_size
"""


def within(key: str, group: tuple[str, ...]) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in group)


def changed(key: str, value: Any = "something else") -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    node[last] = value
    return tree


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_is_free_rounding_or_mathematics(key: str) -> None:
    maths, rounding = differences(TREE, changed(key))
    if key == "zeroth_order.total_steps":
        assert (maths, rounding) == ([], [])  # without a schedule that decays it means nothing
    elif within(key, FREE):
        assert (maths, rounding) == ([], [])
    elif within(key, ROUNDING):
        assert [d.key for d in rounding] == [key]
        assert maths == []
    else:
        assert [d.key for d in maths] == [key]
        assert rounding == []
        assert str(maths[0]).startswith(f"{key}: ")
        assert str(maths[0]).endswith("-> something else")


def test_what_may_change_is_what_the_page_says() -> None:
    """Whoever frees a key must change this list, and think."""
    free = {key for key in LEAVES if within(key, FREE) or within(key, ROUNDING)}
    assert set(LEAVES) - free == set(MATHEMATICS.split())


@pytest.mark.parametrize("schedule", ["lr_schedule", "eps_schedule"])
def test_length_of_the_run_counts_under_a_schedule(schedule: str) -> None:
    old = changed(f"zeroth_order.{schedule}", "cosine")
    new = copy.deepcopy(old)
    new["zeroth_order"]["total_steps"] = 20
    assert [d.key for d in differences(old, new)[0]] == ["zeroth_order.total_steps"]


def test_a_key_that_one_side_does_not_know() -> None:
    """A run of an older version, which had the present default without a name."""
    older = copy.deepcopy(TREE)
    del older["zeroth_order"]["spread_std"]
    assert differences(older, TREE) == ([], [])
    other = changed("zeroth_order.spread_std", "population")
    assert [str(d) for d in differences(older, other)[0]] == ["zeroth_order.spread_std: sample -> population"]


def test_deepspeed_settings_are_rounding_wherever_they_are() -> None:
    new = changed("deepspeed", {"zero_optimization": {"stage": 3}})
    assert [d.key for d in differences(TREE, new)[1]] == ["deepspeed.zero_optimization.stage"]
