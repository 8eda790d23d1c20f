"""Adapters: what they start from, what is trained and saved, and that they are peft's own to the last bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import zo_ds
from tests.conftest import STORES
from tests.launch import jobs
from tests.unit.families import batch_for, family, fzoo, gap, mezo, pair
from zo_ds.config.schema import ModelConfig, PeftConfig
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.export import save_pretrained
from zo_ds.engine.resume import Options, open_run
from zo_ds.errors import ConfigError, DataError
from zo_ds.forward.head import logits_at
from zo_ds.forward.loss import model_loss
from zo_ds.journal.history import read_journal
from zo_ds.journal.replay import replay_
from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.names import canonical_names
from zo_ds.models.adapter_start import first_values, uniform
from zo_ds.models.adapters import adapt, base_source, load_adapted
from zo_ds.models.load import LoadedModel
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore, fill_in_place
from zo_ds.tensor_files import folder_files

pytestmark = pytest.mark.usefixtures("one_thread")
CAUSAL = ("opt-125m", "opt-350m", "llama", "phi", "gpt2", "neox")
"""transformers, not `open_checkpoint`, loads the last of them: it renames what is in its file."""
FAMILIES = (*CAUSAL, "roberta-mlm", "roberta-classes", "llama-classes")
WRAPPED = ("lora", "ia3", "prefix", "prompt")
CLASSES = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
}
SOME = [(name, method) for name in FAMILIES for method in ("lora", "prefix")]
SOME += [(name, method) for name in ("opt-125m", "roberta-classes") for method in ("ia3", "prompt")]
TOKENS = 3
EXACT = 1e-6
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Gives the folder of a family's model, with a tokenizer."""
    tokenizer, made = jobs.make_model(tmp_path_factory.mktemp("tokenizer")), dict[str, Path]()

    def find(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            for file in tokenizer.glob("tokenizer*"):
                shutil.copy(file, made[name])
            family(name).save_pretrained(made[name])
        return made[name]

    return find


def load(folder: Path, method: str, dtype: str = "float32", **settings: Any) -> LoadedModel:
    peft = PeftConfig(**{"method": method, "virtual_tokens": TOKENS, **settings})
    return load_adapted(ModelConfig.model_validate({"path": str(folder), "dtype": dtype}), peft, 3)


def fill(loaded: LoadedModel, structure: NoiseStructure = NoiseStructure.DENSE) -> ResidentStore:
    """All first weights, in memory."""
    fill_in_place(loaded.module, None)
    store = ResidentStore(loaded.module, trainable_parameters(loaded.module), structure)
    if loaded.source is not None:
        store.fill(loaded.source)
    if loaded.start is not None:
        with torch.inference_mode():
            values = loaded.start(loaded.module)
        assert values
        store.load({**dict(trained(store)), **values})
    return store


def trained(store: ResidentStore) -> list[tuple[str, Tensor]]:
    return [(info.name, parameter.detach()) for parameter, info in store.parameters.items()]


def stirred(store: ResidentStore) -> ResidentStore:
    """Away from the start, where adapters are the identity and parts of a direction have no effect."""
    generator = torch.Generator().manual_seed(1)
    for _, tensor in trained(store):
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
    return store


def inputs(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in batch_for(name).items() if key != "labels"}


def logits(model: nn.Module, **given: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**given).logits
    return found


# First values


def test_what_is_drawn_is_uniform_and_the_same_in_pieces() -> None:
    whole = uniform("a.lora_A.weight", 0, 0, 40_000)
    assert whole.dtype == torch.float64
    assert float(whole.abs().max()) < 1
    assert abs(float(whole.mean())) < 0.02
    assert abs(float(whole.square().mean()) - 1 / 3) < 0.01
    assert len(whole.unique()) == 40_000
    pieces = [
        uniform("a.lora_A.weight", 0, start, count) for start, count in ((0, 7), (7, 1), (8, 4099), (4107, 35893))
    ]
    assert torch.equal(torch.cat(pieces), whole)
    for name, seed in (("b.lora_A.weight", 0), ("a.lora_A.weight", 1)):
        assert abs(float((uniform(name, seed, 0, 40_000) * whole).mean())) < 0.01


def test_there_is_a_rule_for_every_parameter_or_none() -> None:
    with pytest.raises(ConfigError, match="no rule for the first values of 'strange'"):
        first_values({"strange": (2,)}, 0)


@pytest.mark.parametrize("method", WRAPPED)
@pytest.mark.parametrize("name", ["opt-350m", "roberta-classes"])
def test_the_start_is_a_function_of_the_configuration_alone(name: str, method: str, saved: Saved) -> None:
    digests = []
    for generator, seed in ((1, 0), (2, 0), (1, 1)):
        base = load(saved(name), "none")
        torch.manual_seed(generator)
        before = torch.get_rng_state()
        loaded = adapt(base, PeftConfig.model_validate({"method": method, "seed": seed}))
        assert torch.equal(torch.get_rng_state(), before)
        digests.append(fill(loaded).digest())
    assert digests[0] == digests[1]
    assert (digests[0] == digests[2]) == (method == "ia3")


def test_lora_starts_within_the_bounds_that_peft_draws_from(saved: Saved) -> None:
    import peft

    store = fill(load(saved("llama"), "lora", r=16))
    theirs = peft.get_peft_model(family("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=16))
    for parameter, name in canonical_names(theirs).items():
        if parameter.requires_grad:
            ours = dict(trained(store))[name]
            assert ours.shape == parameter.shape
            assert bool(ours.count_nonzero()) == bool(parameter.count_nonzero()) == name.endswith("lora_A.weight")
            if ours.count_nonzero():
                assert 0.9 * 16**-0.5 < float(ours.abs().max()) <= 16**-0.5
                assert abs(float(ours.std() / parameter.std()) - 1) < 0.2


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_starts_as_the_base_model(name: str, method: str, saved: Saved) -> None:
    loaded = load(saved(name), method)
    fill(loaded)
    base = CLASSES[loaded.head].from_pretrained(saved(name), dtype=torch.float32).eval()
    assert torch.equal(logits(loaded.module, **inputs(name)), logits(base, **inputs(name)))


@pytest.mark.parametrize("text", [None, "the film was great"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", [*CAUSAL, "roberta-mlm"])
def test_a_soft_prompt_starts_as_real_tokens(name: str, method: str, text: str | None, saved: Saved) -> None:
    if (name, method) == ("roberta-mlm", "prefix"):
        pytest.skip("tokens before others see these too, if all see each other")
    loaded = load(saved(name), method, start_text=text)
    fill(loaded)
    base = CLASSES[loaded.head].from_pretrained(saved(name), dtype=torch.float32).eval()
    ids = batch_for(name)["input_ids"][:2]  # none of these is padded
    found = logits(loaded.module, input_ids=ids, attention_mask=torch.ones_like(ids))[:, -ids.shape[1] :]
    if text is not None:
        tokens = loaded.tokenizer(text)["input_ids"][:TOKENS]
        whole = torch.cat([torch.tensor([tokens] * len(ids)), ids], 1)
        wanted = logits(base, input_ids=whole, attention_mask=torch.ones_like(whole))[:, TOKENS:]
        assert torch.allclose(found, wanted, atol=1e-5)
    else:
        assert not torch.allclose(found, logits(base, input_ids=ids), atol=1e-3)


def test_a_soft_prompt_may_start_from_noise(saved: Saved) -> None:
    loaded = load(saved("llama"), "prefix", start="noise")
    assert loaded.start is None
    ((_, values),) = trained(fill(loaded))
    assert 0.01 < float(values.std()) < 0.03


def test_a_prefix_that_the_model_has_no_cache_for_starts_from_noise(saved: Saved) -> None:
    loaded = load(saved("llama"), "prefix")
    fill_in_place(loaded.module, loaded.source)
    loaded.module.get_submodule("base_model.model").register_forward_pre_hook(_refuse)
    assert loaded.start is not None
    assert loaded.start(loaded.module) == {}


def _refuse(module: nn.Module, args: Any) -> None:
    raise TypeError("no such argument")


# What is trained, and its names


@pytest.mark.parametrize("method", WRAPPED)
@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_in_pefts_files(name: str, method: str, saved: Saved) -> None:
    from peft.utils import get_peft_model_state_dict

    loaded = load(saved(name), method, "bfloat16")
    store = fill(loaded)
    wanted = get_peft_model_state_dict(loaded.module, save_embedding_layers=False)
    found = dict(trained(store))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key].to(value.dtype), value) for key, value in wanted.items())
    # A matrix of the model's own that is trained beside the adapter keeps its dtype.
    own = {key for key, tensor in found.items() if tensor.dtype == torch.bfloat16}
    assert all("classifier" in key or "score" in key for key in own)
    frozen = [p for p in loaded.module.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert store.partial
    assert [key for key, _ in store.views(frozen=False)] == [info.name for info in store.parameters.values()]
    assert loaded.max_tokens == load(saved(name), "none").max_tokens - (TOKENS if method.startswith("pr") else 0)


def test_labels_within_other_names_stay() -> None:
    import peft

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.default = nn.Linear(2, 2)
            self.last = nn.Linear(2, 2)

    model = peft.get_peft_model(Odd(), peft.LoraConfig(target_modules=["default"], modules_to_save=["last"], r=1))
    names = sorted(name for parameter, name in canonical_names(model).items() if parameter.requires_grad)
    assert names == sorted(peft.get_peft_model_state_dict(model))
    assert "base_model.model.default.lora_A.weight" in names


def test_layers_of_ones_own_choice(saved: Saved) -> None:
    names = {key for key, _ in trained(fill(load(saved("opt-125m"), "lora", target_modules=("fc1",), r=2)))}
    assert len(names) == 4
    assert all(".fc1.lora_" in key for key in names)
    with pytest.raises(ConfigError) as caught:
        load(saved("opt-125m"), "lora", target_modules=("nowhere",))
    assert "nowhere" in str(caught.value)
    assert "target_modules" in caught.value.remedy


def test_biases_alone(saved: Saved, tmp_path: Path) -> None:
    loaded = load(saved("opt-125m"), "bias")
    store = stirred(fill(loaded))
    assert {key.rpartition(".")[2] for key, _ in trained(store)} == {"bias"}
    save_pretrained(store, tmp_path / "model", loaded.tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again, **inputs("opt-125m")), logits(loaded.module, **inputs("opt-125m")))
    with pytest.raises(ConfigError, match="no biases to train"):
        load(saved("llama"), "bias")


def test_an_adapter_needs_its_kind() -> None:
    for method in ("none", "bias"):
        with pytest.raises(ValueError, match="path names an adapter"):
            PeftConfig.model_validate({"method": method, "path": "somewhere"})


# Saving, loading, going on


@pytest.mark.parametrize(("name", "method"), SOME)
def test_peft_loads_what_is_saved(name: str, method: str, saved: Saved, tmp_path: Path) -> None:
    import peft

    loaded = load(saved(name), method)
    store, folder = stirred(fill(loaded)), tmp_path / "adapter"
    save_pretrained(store, folder, loaded.tokenizer, {"step": 3})
    files = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "zo_ds.json",
    }
    assert {file.name for file in folder.iterdir()} == files
    wanted = logits(loaded.module, **inputs(name))
    base = CLASSES[loaded.head].from_pretrained(saved(name), dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(logits(again, **inputs(name)), wanted)
    if loaded.head == "causal_lm":
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(logits(auto, **inputs(name)), wanted)
    held = load(saved(name), method, path=str(folder), virtual_tokens=9)
    assert held.start is None
    assert fill(held).digest() == store.digest()
    assert torch.equal(logits(held.module, **inputs(name)), wanted)
    before = (folder / "adapter_config.json").read_bytes()
    save_pretrained(store, folder, loaded.tokenizer, {"step": 4})
    assert (folder / "adapter_config.json").read_bytes() == before
    assert json.loads((folder / "zo_ds.json").read_text()) == {"step": 4}


def test_going_on_from_an_adapter_that_peft_saved(saved: Saved, tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(family("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=3, use_dora=True)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad, alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(saved("llama"), "lora", path=str(tmp_path / "theirs"))
    store = fill(loaded)
    assert torch.equal(logits(loaded.module, **inputs("llama")), logits(theirs, **inputs("llama")))
    save_pretrained(store, tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_adapters_that_cannot_be_gone_on_from(saved: Saved, tmp_path: Path) -> None:
    loaded = load(saved("llama"), "lora")
    save_pretrained(fill(loaded), tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    with pytest.raises(DataError, match="there is no adapter"):
        load(saved("llama"), "lora", path=str(tmp_path))
    with pytest.raises(ConfigError, match="of another kind, LORA"):
        load(saved("llama"), "prefix", path=path)
    with pytest.raises(DataError, match="the adapter is of another model"):
        load(saved("phi"), "lora", path=path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(DataError, match="safe_serialization=True"):
        load(saved("llama"), "lora", path=path)
    for text in ("[]", "{", '{"peft_type": "LORA", "r": "x", "target_modules": 3}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises((DataError, ConfigError)):
            load(saved("llama"), "lora", path=path)


# Stores and runs


SPACES = {**STORES, "zero3-disk": {"stage": 3, "offload_param": {"device": "nvme"}}}


def open_engine(loaded: LoadedModel, store: str, folder: Path, **settings: Any) -> ZOEngine:
    zero = json.loads(json.dumps(SPACES[store]))
    if store == "zero3-disk":
        zero["offload_param"]["nvme_path"] = str(folder)
    config = {"zero_optimization": zero, "zeroth_order": {"num_directions": 4, "lr": 1e-2, "eps": 1e-2, **settings}}
    engine = zo_ds.initialize(loaded.module, config, weights=loaded.source)
    if loaded.start is not None:
        compute = loaded.start
        values = engine.call(lambda model, _: compute(model), None)
        engine.load_weights(lambda name, start, out: _take(values, name, start, out))
    return engine


def _take(values: Mapping[str, Tensor], name: str, start: int, out: Tensor) -> None:
    out.copy_(values[name].reshape(-1)[start : start + out.numel()])


@pytest.mark.parametrize("method", [*WRAPPED, "bias"])
@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("opt-350m", "bfloat16")])
def test_stores_train_the_same_adapter(name: str, method: str, dtype: str, saved: Saved, tmp_path: Path) -> None:
    if (name, method) == ("llama", "bias"):
        pytest.skip("it has none")
    found = set()
    for store in SPACES:
        loaded = load(saved(name), method, dtype)
        engine = open_engine(loaded, store, tmp_path)
        first = engine.digest()
        frozen = {key: _copied(held) for key, held in engine.store.views() if key not in names_of(engine)}
        steps = [engine.step(batch_for(name)) for _ in range(3)]
        assert all(step.skip is None for step in steps)
        found.add((first, tuple(step.clean_loss for step in steps), engine.digest()))
        assert first != engine.digest()
        after = dict(engine.store.views())
        assert all(torch.equal(_copied(after[key]), tensor) for key, tensor in frozen.items())
        engine.load_weights(base_source(*_settings(saved(name), method, dtype), loaded))
        assert (engine.digest() == first) == (loaded.start is None)
        engine.store.close()
    assert len(found) == 1


def _settings(folder: Path, method: str, dtype: str) -> tuple[ModelConfig, PeftConfig, int]:
    model = ModelConfig.model_validate({"path": str(folder), "dtype": dtype})
    return model, PeftConfig.model_validate({"method": method, "virtual_tokens": TOKENS}), 3


def names_of(engine: ZOEngine) -> set[str]:
    return {info.name for info in engine.store.parameters.values()}


def _copied(held: Any) -> Tensor:
    tensor: Tensor = held.read() if hasattr(held, "read") else held
    return tensor.clone()


@pytest.mark.parametrize("store", ["resident", "zero3-cpu"])
@pytest.mark.parametrize("method", [*WRAPPED, "bias"])
def test_a_run_keeps_and_replays_the_adapter_alone(method: str, store: str, saved: Saved, tmp_path: Path) -> None:
    loaded = load(saved("opt-125m"), method)
    engine = open_engine(loaded, store, tmp_path)
    begun = {key: _copied(held) for key, held in engine.store.views(frozen=False)}
    open_run(engine, tmp_path / "run", Options(total_steps=6))
    for step in range(3):
        engine.step(batch_for("opt-125m", 2 + step))
    assert engine.durability is not None
    engine.durability.snapshot()
    for step in range(3):
        engine.step(batch_for("opt-125m", 3 + step))
    engine.close_journal()
    (snapshot,) = (tmp_path / "run" / "snapshots").glob("step-*")
    assert set(folder_files(snapshot).entries) == names_of(engine)
    assert not list(snapshot.glob("*config.json"))
    history = read_journal(tmp_path / "run" / "journal")
    assert {info.name for info in history.header.parameters} == names_of(engine)
    assert replay_(begun, history).weights_sha256 == engine.digest()
    again = open_engine(load(saved("opt-125m"), method), store, tmp_path)
    resumed = open_run(again, tmp_path / "run", Options(total_steps=6))
    assert (resumed.step, resumed.replayed) == (6, 3)
    assert again.digest() == engine.digest()
    again.close_journal()


def test_an_adapter_stays_wide_where_deepspeed_makes_the_model_narrow() -> None:
    import peft

    model = peft.get_peft_model(family("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    engine = zo_ds.initialize(model, {"bf16": {"enabled": True}, "zeroth_order": {"num_directions": 4}})
    assert {info.dtype for info in engine.store.parameters.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad and p.dim() > 1} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["p-tuning", "injected"])
def test_adapters_that_peft_alone_could_save(kind: str, tmp_path: Path) -> None:
    import peft

    if kind == "injected":
        model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), family("llama"))
    else:
        settings = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4)
        model = peft.get_peft_model(family("llama"), settings)
    store = ResidentStore(model, trainable_parameters(model), NoiseStructure.DENSE)
    with pytest.raises(ConfigError, match="this adapter cannot be saved"):
        save_pretrained(store, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# The forward of all directions at once


def at_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses from logits at labelled positions, of which sequences have different numbers."""
    labels = batch["labels"]
    given = {key: value for key, value in batch.items() if key != "labels"}
    if labels.dim() == 1:
        return nn.functional.cross_entropy(model(**given).logits.double(), labels, reduction="none")
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    order = torch.arange(len(rows)).flip(0)  # not row after row
    rows, columns = rows[order], columns[order]
    each = nn.functional.cross_entropy(
        logits_at(model, given, rows, columns).double(), labels[rows, columns], reduction="none"
    )
    return torch.zeros(len(labels), dtype=torch.float64).index_add(0, rows, each)


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        *((name, NoiseStructure.DENSE) for name in FAMILIES),
        *((name, NoiseStructure.FACTORED) for name in ("opt-350m", "roberta-classes")),
    ],
)
@pytest.mark.parametrize("method", [*WRAPPED, "bias"])
def test_all_directions_flow_at_once(
    name: str, method: str, structure: NoiseStructure, saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    if (name, method) in (("llama", "bias"), ("llama-classes", "bias")):
        pytest.skip("it has none")
    loaded = load(saved(name), method)
    stirred(fill(loaded, structure))
    found = pair(loaded.module, at_labels, structure)
    batch = batch_for(name)
    if batch["labels"].dim() > 1:
        batch["labels"][0, 2:] = -100
    with caplog.at_level(logging.WARNING, logger="zo_ds"):
        for places in (fzoo(4, 0.05), mezo(2, 0.05)):
            assert gap(found, batch, places) < EXACT
        assert gap(found, batch_for(name, 3, 5), fzoo(4, 0.05)) < EXACT
    assert "one direction at a time" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", WRAPPED)
def test_16_bit_models_under_autocast(method: str, dtype: torch.dtype, saved: Saved) -> None:
    loaded = load(saved("llama"), method, str(dtype).removeprefix("torch."))
    stirred(fill(loaded))
    found = pair(loaded.module, at_labels, autocast=dtype)
    assert gap(found, batch_for("llama"), fzoo(4, 0.05)) < 1e-2


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_few_places_at_a_time_and_the_models_own_loss(method: str, saved: Saved) -> None:
    loaded = load(saved("opt-125m"), method)
    stirred(fill(loaded))
    found = pair(loaded.module, model_loss, replicas=2)
    assert gap(found, batch_for("opt-125m"), fzoo(4, 0.05)) < EXACT


@pytest.mark.parametrize("method", WRAPPED)
@pytest.mark.parametrize("name", ["opt-125m", "gpt2", "roberta-mlm"])
def test_only_positions_with_labels_reach_the_head(name: str, method: str, saved: Saved) -> None:
    loaded = load(saved(name), method)
    stirred(fill(loaded))
    rows, columns = torch.tensor([3, 0, 3, 1]), torch.tensor([1, 4, 0, 2])
    with torch.inference_mode():
        whole = loaded.module(**inputs(name)).logits
        whole = whole[:, -6:]  # soft prompts come before the tokens
        some = logits_at(loaded.module, inputs(name), rows, columns)
        none = logits_at(loaded.module, inputs(name), rows[:0], columns[:0])
    assert torch.allclose(some, whole[rows, columns], atol=1e-5)
    assert none.shape == (0, whole.shape[-1])
