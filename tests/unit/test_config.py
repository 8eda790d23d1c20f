"""Recipes: defaults, overrides, and errors that name the key, the value and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from zo_ds.config.load import all_keys, apply_override, load_config, read_yaml, validate
from zo_ds.config.schema import ZerothOrderConfig, ZOConfig
from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.estimators import Estimator, EstimatorSpec, SpreadStd
from zo_ds.maths.schedules import Schedule

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"steps": 10}}

KEYS = """
name
resume
model model.path model.revision model.gguf model.dtype model.head
peft peft.method peft.r peft.alpha peft.target_modules peft.virtual_tokens peft.start peft.start_text peft.seed
peft.path
data data.path data.subset data.revision data.splits data.shots data.text_field data.label_field data.max_length
data.train_examples data.dev_examples data.test_examples data.balanced data.group_by_length data.seed
task task.name task.template task.label_words task.objective task.reward task.length_normalised task.calibrated
task.max_new_tokens
method
zeroth_order zeroth_order.estimator zeroth_order.num_directions zeroth_order.baseline zeroth_order.momentum
zeroth_order.momentum_window zeroth_order.eps zeroth_order.lr zeroth_order.lr_schedule zeroth_order.eps_schedule
zeroth_order.warmup_steps zeroth_order.final_ratio zeroth_order.total_steps zeroth_order.weight_decay
zeroth_order.noise zeroth_order.forward zeroth_order.replicas_per_pass zeroth_order.activation_budget_mib
zeroth_order.strict zeroth_order.spread_std zeroth_order.spread_floor zeroth_order.coefficient_cap
zeroth_order.max_consecutive_skips zeroth_order.run_seed
first_order first_order.optimizer first_order.lr first_order.weight_decay first_order.betas first_order.eps
first_order.momentum first_order.lr_schedule first_order.warmup_steps first_order.final_ratio
first_order.max_grad_norm first_order.max_consecutive_skips
in_context in_context.shots
training training.steps training.batch_size training.micro_batch_size training.eval_every training.best_by
training.patience training.eval_batch_size
parallel parallel.layout parallel.shard_size parallel.population parallel.data parallel.gpu_budget_gib
parallel.channel parallel.threads parallel.timeout_s parallel.hang_s
journal journal.sync_every journal.hash_every journal.snapshot_replay_s journal.keep_snapshots journal.audit_every
output output.run_dir output.tensorboard output.save_model
deepspeed
"""


def recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_public_surface_is_frozen() -> None:
    assert all_keys(ZOConfig) == KEYS.split()


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {model.__name__: model}
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind)
    return found


def test_every_setting_has_its_meaning_beside_it() -> None:
    leaves = {
        f"{section}.{name}": field.description
        for section, model in sections(ZOConfig).items()
        for name, field in model.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    }
    assert len(leaves) > 40
    assert [name for name, text in leaves.items() if not (text and text.strip().endswith("."))] == []


@pytest.mark.parametrize(
    ("item", "key"),
    [
        ("zeroth_order.replicas_per_pass=0", "zeroth_order.replicas_per_pass"),
        ("parallel.threads=x", "parallel.threads"),
        ("deepspeed=3", "deepspeed"),
        ("task.label_words=[1, b]", "task.label_words.0"),
    ],
)
def test_a_refused_value_is_named_by_its_key_alone(item: str, key: str, tmp_path: Path) -> None:
    """Pydantic adds the types that it tried."""
    assert set(re.findall(r"- '([^']+)':", refused(recipe(tmp_path), item))) == {key}


def test_defaults(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path))
    assert (config.model.path, config.data.path, config.training.steps) == ("m", "d", 10)
    assert (config.name, config.model.dtype, config.model.head) == ("run", "float32", "auto")
    assert (config.training.batch_size, config.training.micro_batch_size, config.training.eval_every) == (16, 8, None)
    assert config.deepspeed == {}
    zeroth_order = config.zeroth_order
    assert zeroth_order == ZerothOrderConfig()
    assert zeroth_order.estimator_spec == EstimatorSpec(Estimator.FZOO, 8, SpreadStd.SAMPLE, 1e-8, 1.0)
    assert (zeroth_order.eps, zeroth_order.lr, zeroth_order.weight_decay, zeroth_order.run_seed) == (1e-3, "rule", 0, 0)
    assert (zeroth_order.noise, zeroth_order.lr_schedule) == (NoiseStructure.DENSE, Schedule.CONSTANT)


def test_overrides_are_typed_by_yaml(tmp_path: Path) -> None:
    path = recipe(tmp_path, output={"save_model": True})
    items = [
        "zeroth_order.eps=1e-6",
        "zeroth_order.lr=2.5e-03",
        "zeroth_order.estimator=mezo",
        "zeroth_order.num_directions=1",
        f"zeroth_order.run_seed={2**64 - 1}",
        "training.eval_every=5",
        "output.save_model=false",
        "data.max_length=null",
        "task.label_words=[bad, 'good = fine']",
        "task.template='{text} It was'",
        "name=",
        "name=a.b=c",
        "deepspeed.zero_optimization.stage=3",
    ]
    config = load_config(path, items)
    zeroth_order = config.zeroth_order
    assert (zeroth_order.eps, zeroth_order.lr, zeroth_order.num_directions) == (1e-6, 2.5e-3, 1)
    assert type(zeroth_order.eps) is float
    assert (zeroth_order.estimator, zeroth_order.run_seed) == (Estimator.MEZO, 2**64 - 1)
    assert (config.training.eval_every, config.output.save_model, config.data.max_length) == (5, False, None)
    assert config.task.label_words == ("bad", "good = fine")
    assert config.task.template == "{text} It was"
    assert config.name == "a.b=c"
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("modle", "model"),
        ("zeroth_ordr", "zeroth_order"),
        ("training.num_step", "training.steps"),
        ("zeroth_order.num_direction", "zeroth_order.num_directions"),
        ("parallel.timeout", "parallel.timeout_s"),
        ("data.text_feild", "data.text_field"),
        # the right key in the wrong section
        ("lr", "zeroth_order.lr"),
        ("run_dir", "output.run_dir"),
        ("data.batch_size", "training.batch_size"),
        ("model.max_length", "data.max_length"),
        ("training.num_directions", "zeroth_order.num_directions"),
        ("training.lr", "zeroth_order.lr"),
        ("training.eps", "zeroth_order.eps"),
    ],
)
def test_unknown_key_comes_with_the_nearest_known_one(tmp_path: Path, key: str, suggestion: str) -> None:
    message = refused(recipe(tmp_path), f"{key}=1")
    assert f"unknown key '{key}'; did you mean '{suggestion}'?" in message
    assert str(tmp_path / "recipe.yaml") in message


def test_a_key_like_no_other_gets_no_suggestion(tmp_path: Path) -> None:
    assert "unknown key 'qqqqqqqq'\n" in refused(recipe(tmp_path, qqqqqqqq=1))


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    message = refused(recipe(tmp_path, model={}, data={"path": "d", "seed": "x"}), "training.stepz=1")
    assert "'model.path' is missing" in message
    assert "'data.seed'" in message
    assert "(got 'x')" in message
    assert "unknown key 'training.stepz'" in message
    assert message.count("\n  - ") == 3


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_missing_section(tmp_path: Path, section: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != section}))
    assert f"'{section}' is missing" in refused(path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("zeroth_order.num_directions=3", ["num_directions is 3", "use 4 or more", "estimator: mezo"]),
        ("zeroth_order.num_directions=0", ["'zeroth_order.num_directions'", "(got 0)"]),
        ("zeroth_order.estimator=fzo", ["'zeroth_order.estimator'", "'fzoo', 'fzoo_r', 'mezo'", "(got 'fzo')"]),
        *[(f"zeroth_order.{key}={v}", [f"'zeroth_order.{key}'"]) for key in ("eps", "lr") for v in (0, -1e-3, ".nan")],
        *[
            (f"zeroth_order={{estimator: {name}, num_directions: {n}, baseline: {baseline}}}", parts)
            for name, n, baseline, parts in (
                ("fzoo_r", 2, "clean", ["num_directions is 2", "the N of the step before; use 3 or more"]),
                ("zo_sgd_cons", 8, "clean", ["num_directions is 8", "set num_directions: 1"]),
                ("zo_sgd", 1, "mean", ["num_directions is 1", "compares each loss with the others; use 2 or more"]),
                ("mezo", 8, "mean", ["baseline is mean: mezo compares two sides", "fzoo, fzoo_r, zo_sgd"]),
                ("zo_sgd_sign", 8, "mean", ["baseline is mean: zo_sgd_sign compares two sides"]),
                ("zo_sgd_cons", 1, "mean", ["baseline is mean: zo_sgd_cons compares two sides"]),
            )
        ],
        ("zeroth_order.baseline=l0", ["'zeroth_order.baseline'", "'clean' or 'mean'", "(got 'l0')"]),
        *[(f"zeroth_order.momentum={value}", ["'zeroth_order.momentum'"]) for value in (-0.1, 1, ".nan")],
        ("zeroth_order.momentum_window=1", ["'zeroth_order.momentum_window'", "(got 1)"]),
        (
            "zeroth_order={num_directions: 256, momentum: 0.9, momentum_window: 256}",
            ["is 65536", "room for 65535 coefficients"],
        ),
        ("zeroth_order.eps=.inf", ["'zeroth_order.eps'", "(got inf)"]),
        ("zeroth_order.eps=small", ["'zeroth_order.eps'", "(got 'small')"]),
        ("zeroth_order.weight_decay=1", ["'zeroth_order.weight_decay'"]),
        ("zeroth_order.run_seed=-1", ["'zeroth_order.run_seed'"]),
        (f"zeroth_order.run_seed={2**64}", ["'zeroth_order.run_seed'"]),
        ("training.micro_batch_size=5", ["micro_batch_size 5 does not divide batch_size 16", "divisor"]),
        ("training.steps=0", ["'training.steps'", "(got 0)"]),
        ("training.steps=2.5", ["'training.steps'", "(got 2.5)"]),
        ("training.steps=", ["'training.steps'", "(got None)"]),
        ("model.dtype=float64", ["'model.dtype'", "(got 'float64')"]),
        ("training=5", ["'training'", "(got 5)"]),
    ],
)
def test_bad_value_is_refused_with_its_key(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = refused(recipe(tmp_path), override)
    for part in parts:
        assert part in message


def test_eps_may_not_decay_to_zero(tmp_path: Path) -> None:
    message = refused(recipe(tmp_path), "zeroth_order.eps_schedule=linear", "zeroth_order.final_ratio=0")
    assert "eps would end at 0" in message
    load_config(recipe(tmp_path), ["zeroth_order.lr_schedule=linear", "zeroth_order.final_ratio=0"])


def test_a_window_counts_only_with_momentum() -> None:
    assert ZerothOrderConfig().window == ZerothOrderConfig(momentum_window=8).window == 1
    assert ZerothOrderConfig(momentum=0.9).window == 16
    assert ZerothOrderConfig(momentum=0.5, momentum_window=2).window == 2
    assert ZerothOrderConfig(num_directions=2**16 - 1).window == 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("estimator", ["mezo", "zo_sgd", "zo_sgd_sign"])
def test_few_directions_are_fine_without_normalisation(estimator: str, n: int) -> None:
    config = validate(ZerothOrderConfig, {"estimator": estimator, "num_directions": n}, where="here")
    assert config.estimator_spec.num_directions == n


@pytest.mark.parametrize("item", ["training.steps", "=5", "training..steps=1", ".x=1", "x.=1", ""])
def test_malformed_override(item: str) -> None:
    with pytest.raises(ConfigError, match="is not an override"):
        apply_override({}, item)


def test_override_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match="the value of 'name' is not valid YAML"):
        apply_override({}, "name=[1, 2")


def test_override_below_a_value() -> None:
    with pytest.raises(ConfigError, match=r"'a\.b' is a value, not a section"):
        apply_override({"a": {"b": 1}}, "a.b.c=2")


def test_file_missing(tmp_path: Path) -> None:
    assert "cannot read the configuration: No such file" in refused(tmp_path / "none.yaml")
    assert "cannot read the configuration: Is a directory" in refused(tmp_path)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  path: a\n  dtype: [float32\ndata: x\n")
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        read_yaml(path)
    assert caught.value.where == f"{path}:4"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


@pytest.mark.parametrize(("text", "kind"), [("- 1\n", "list"), ("", "NoneType"), ("text", "str")])
def test_not_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    assert f"found {kind}" in refused(path)


def test_deepspeed_path_is_found_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "ds").mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    beside = tmp_path / "ds" / "a.json"
    beside.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (elsewhere / "b.json").write_text("{}")
    assert load_config(recipe(tmp_path, deepspeed="ds/a.json")).deepspeed == str(beside)
    assert load_config(recipe(tmp_path, deepspeed=str(beside))).deepspeed == str(beside)
    assert load_config(recipe(tmp_path, deepspeed="b.json")).deepspeed == "b.json"


def test_configuration_is_immutable_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path), ["zeroth_order.noise=factored", "task.label_words=[a, b]"])
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config
