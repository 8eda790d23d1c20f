"""A model whose weights are streamed is the one that transformers loads, to the last bit."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zo_ds
from tests.launch import jobs
from tests.unit.families import MOE, SPECS, batch_for, family
from zo_ds.config.schema import ModelConfig, PeftConfig
from zo_ds.errors import DataError
from zo_ds.models.adapters import base_source
from zo_ds.models.load import LoadedModel, load_model
from zo_ds.stores.resident import fill_in_place

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
}
FALL_BACK = MOE | {"neox"}
"""Families whose checkpoints transformers renames or joins on the way."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def save(tmp_path: Path, tokenizer: Path) -> Callable[..., Path]:
    """Writes a model beside a tokenizer."""

    def write(model: nn.Module, **options: Any) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in tokenizer.glob("tokenizer*"):
            shutil.copy(file, folder)
        model.save_pretrained(folder, **options)
        return folder

    return write


def load(folder: Path, dtype: torch.dtype = torch.float32, head: str = "auto", labels: int = 3) -> LoadedModel:
    return load_model(settings(folder, dtype, head), labels)


def settings(folder: Path, dtype: torch.dtype = torch.float32, head: str = "auto") -> ModelConfig:
    return ModelConfig(path=str(folder), dtype=str(dtype).removeprefix("torch."), head=head)


def streamed(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A model that came without weights, filled."""
    loaded = load(folder, dtype, **options)
    assert loaded.source is not None
    assert all(parameter.is_meta for parameter in loaded.module.parameters())
    assert not any(buffer.is_meta for buffer in loaded.module.buffers())
    fill_in_place(loaded.module, loaded.source)
    return loaded.module


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32, head: str = "") -> nn.Module:
    kind = CLASSES[head or load(folder).head]
    model: nn.Module = kind.from_pretrained(folder, dtype=dtype).eval()
    return model


def every_name(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in every_name(model).items():
        groups.setdefault(id(parameter), []).append(name)
    return sorted(tuple(group) for group in groups.values())


def check_same(found: nn.Module, wanted: nn.Module, exact: dict[str, Tensor] | None = None) -> None:
    """Matrices, buffers and ties are equal; vectors too, in fp32.

    Args:
        exact: of vectors, where the checkpoint has more bits than transformers keeps.
    """
    assert ties(found) == ties(wanted)
    names, other = every_name(found), every_name(wanted)
    for name, value in names.items():
        if value.dim() >= 2:
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name]), name
        else:
            assert value.dtype == torch.float32
            assert torch.equal(value, (exact or other)[name].float()), name
    buffers, expected = dict(found.named_buffers()), dict(wanted.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, value in buffers.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(value, expected[name]), name
    assert found.training is wanted.training is False


def check_settings(found: Any, wanted: Any) -> None:
    for name in ("config", "generation_config"):
        one, other = (getattr(model, name, None) for model in (found, wanted))
        assert (one is None) == (other is None), name
        assert one is None or one.to_dict() == other.to_dict(), name
    assert found.config._attn_implementation == wanted.config._attn_implementation


def logits(model: nn.Module, name: str) -> Tensor:
    batch = {key: value for key, value in batch_for(name).items() if key != "labels"}
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("name", SPECS.keys() - FALL_BACK)
def test_every_family_is_as_transformers_loads_it(name: str, save: Callable[..., Path]) -> None:
    folder = save(family(name))
    found, wanted = streamed(folder), by_transformers(folder)
    check_same(found, wanted)
    check_settings(found, wanted)
    assert torch.equal(logits(found, name), logits(wanted, name))


@pytest.mark.parametrize("name", sorted(FALL_BACK))
def test_families_that_transformers_must_load(name: str, save: Callable[..., Path]) -> None:
    folder = save(family(name))
    loaded = load(folder)
    assert loaded.source is None
    assert torch.equal(logits(loaded.module, name), logits(by_transformers(folder), name))


@pytest.mark.parametrize("held", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [("bert-classes", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float16)]
)
def test_checkpoints_in_another_dtype(
    name: str, held: torch.dtype, dtype: torch.dtype, save: Callable[..., Path]
) -> None:
    """Matrices are rounded as transformers rounds them; vectors keep all the bits that the checkpoint has."""
    folder = save(family(name, held))
    exact = {key: value.detach() for key, value in every_name(by_transformers(folder, held)).items()}
    check_same(streamed(folder, dtype), by_transformers(folder, dtype), exact)


@pytest.mark.parametrize("name", ["llama", "opt-350m", "bert-mlm", "qwen2"])
def test_sharded_checkpoints(name: str, save: Callable[..., Path]) -> None:
    folder = save(family(name), max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    found, wanted = streamed(folder), by_transformers(folder)
    check_same(found, wanted)
    assert torch.equal(logits(found, name), logits(wanted, name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-125m"])
def test_checkpoints_of_the_base_model(name: str, save: Callable[..., Path]) -> None:
    """Without the head's prefix, as gpt2 on the hub."""
    model: Any = family(name, **({} if name == "llama" else {"tie_word_embeddings": True}))
    folder = save(model.base_model)
    prefix = f"{model.base_model_prefix}."
    assert not any(key.startswith(prefix) for key in load_file(folder / "model.safetensors"))
    tree = json.loads((folder / "config.json").read_text())
    tree["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(tree))
    found, wanted = streamed(folder), by_transformers(folder)
    check_same(found, wanted)
    assert torch.equal(logits(found, name), logits(wanted, name))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "model.safetensors"
    tensors = change({name: value.clone() for name, value in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_tied_weight_under_its_other_name(save: Callable[..., Path]) -> None:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("model.embed_tokens", "lm_head"): value for name, value in tensors.items()}

    folder = rewritten(save(family("llama")), rename)
    check_same(streamed(folder), by_transformers(folder))


def test_a_tied_weight_under_both_names(save: Callable[..., Path]) -> None:
    folder = rewritten(save(family("llama")), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    check_same(streamed(folder), by_transformers(folder))


def test_a_weight_that_is_tied_in_the_settings_alone(save: Callable[..., Path]) -> None:
    folder = rewritten(save(family("llama")), lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    loaded, wanted = load(folder), by_transformers(folder)
    fill_in_place(loaded.module, loaded.source)
    assert torch.equal(logits(loaded.module, "llama"), logits(wanted, "llama"))


def test_tensors_that_belong_to_nothing_are_left(save: Callable[..., Path]) -> None:
    folder = rewritten(save(family("llama")), lambda t: {**t, "extra.weight": torch.ones(3)})
    check_same(streamed(folder), by_transformers(folder))


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize("part", ["lm_head", "layers.1.mlp.up_proj"])
def test_a_checkpoint_without_some_weight_is_loaded_by_transformers(part: str, save: Callable[..., Path]) -> None:
    loaded = load(rewritten(save(family("qwen2", tie_word_embeddings=False)), without(part)))
    assert loaded.source is None
    weights = dict(loaded.module.named_parameters())
    assert not any(weight.is_meta for weight in weights.values())
    assert [name for name, weight in weights.items() if not weight.count_nonzero()] == [
        name for name in weights if part in name
    ]


def test_a_new_head_is_loaded_by_transformers(save: Callable[..., Path]) -> None:
    folder = save(family("bert-mlm"))
    loaded = load(folder, head="sequence_classification")
    assert loaded.source is None
    assert not loaded.module.classifier.weight.count_nonzero()
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()  # who writes over the file changes no run


def test_renamed_tensors_are_loaded_by_transformers(save: Callable[..., Path]) -> None:
    """As in old checkpoints of TensorFlow."""

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        return tensors

    folder = save(family("bert-mlm"))
    wanted = logits(by_transformers(folder), "bert-mlm")
    loaded = load(rewritten(folder, rename))
    assert loaded.source is None
    assert torch.equal(logits(loaded.module, "bert-mlm"), wanted)


def test_quantised_checkpoints_are_left_to_transformers(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(family("llama"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "quantization_config": {"quant_method": "fp8"}}))
    asked = []

    def whole(kind: Any, source: str, *_: Any, **__: Any) -> nn.Module:
        asked.append(source)
        return family("llama")

    monkeypatch.setattr("zo_ds.models.load._load_whole", whole)
    assert load(folder).source is None
    assert asked == [str(folder)]


def test_unknown_kinds_of_numbers_are_left_to_transformers(save: Callable[..., Path]) -> None:
    """A tensor that no parameter needs, of a dtype that only transformers knows."""
    extra = {"extra": torch.ones(3).to(torch.float8_e4m3fn)}
    folder = rewritten(save(family("llama")), lambda tensors: {**tensors, **extra})
    wanted = by_transformers(folder, head="causal_lm")
    loaded = load(folder)
    fill_in_place(loaded.module, loaded.source)
    assert torch.equal(logits(loaded.module, "llama"), logits(wanted, "llama"))


def test_a_missing_shard_is_refused(save: Callable[..., Path]) -> None:
    folder = save(family("llama"), max_shard_size="4KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(folder) in caught.value.where


STORES: dict[str, dict[str, Any]] = {
    "resident": {"stage": 0},
    "zero3": {"stage": 3},
    "cpu": {"stage": 3, "offload_param": {"device": "cpu"}},
    "nvme": {"stage": 3, "offload_param": {"device": "nvme"}},
}


@pytest.mark.parametrize(
    ("name", "dtype", "frozen"), [("llama", torch.float32, ""), ("bert-classes", torch.bfloat16, "layer.1")]
)
def test_every_store_gets_the_weights_that_a_whole_model_has(
    name: str, dtype: torch.dtype, frozen: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save(family(name, dtype))
    found = set()
    for store, zero in STORES.items():
        if store == "nvme":
            zero = {**zero, "offload_param": {**zero["offload_param"], "nvme_path": str(tmp_path / "nvme")}}
        config = {"zero_optimization": zero, "zeroth_order": {"num_directions": 4, "lr": 1e-3, "run_seed": 1}}
        for whole in (False, True):
            loaded = load(folder, dtype)
            module, source = loaded.module, loaded.source
            assert source is not None
            if whole:
                module, source = by_transformers(folder, dtype), None
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(not frozen or frozen not in key)
            engine = zo_ds.initialize(module, config, weights=source)
            first = engine.digest()
            step = engine.step(batch_for(name))
            found.add((first, step.clean_loss, tuple(step.coefficients.tolist()), engine.digest()))
            if not whole:
                engine.load_weights(base_source(settings(folder, dtype), PeftConfig(), 3, loaded))
                assert engine.digest() == first
            engine.store.close()
    assert len(found) == 1


PEAK = """
import gc, os, resource, sys, torch, psutil
import zo_ds
from zo_ds.config.schema import ModelConfig
from zo_ds.models.load import load_model

torch.set_num_threads(1)
config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
          "zeroth_order": {"num_directions": 4, "lr": 1e-3}}

def run(folder):
    loaded = load_model(ModelConfig(path=folder, dtype="bfloat16"), 2)
    return zo_ds.initialize(loaded.module, config, weights=loaded.source)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

run(sys.argv[1])
gc.collect()
before = psutil.Process().memory_info().rss
open("/proc/self/clear_refs", "w").write("5")
engine = run(sys.argv[2])
weights = sum(p.ds_numel * p.dtype.itemsize for p in engine.module.parameters())
print(weights, peak() - before)
"""


def test_a_model_is_in_memory_once(tokenizer: Path, tmp_path: Path) -> None:
    """The peak of loading into host memory is the weights and little more, though none of them is where it will be."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 10000, "num_hidden_layers": 5}
    model = transformers.LlamaForCausalLM
    kind = transformers.LlamaConfig(**wide, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"):
        large = model(kind)
    tensors = {name: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for name, p in large.named_parameters()}
    folder = tmp_path / "large"
    shutil.copytree(tokenizer, folder)
    kind.architectures = ["LlamaForCausalLM"]
    kind.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tokenizer), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=jobs.environment(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights, grown = map(int, done.stdout.split()[-2:])
    assert weights > 180e6
    assert 0.9 * weights < grown < 1.15 * weights + 30e6
