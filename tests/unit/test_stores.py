"""Where the weights are makes no difference: not to a bit of a step, and not to the model that is saved."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import zo_ds
from tests.conftest import STORES, small_files, tiny_model, weights_of, zo_batch
from zo_ds.engine.engine import ZOEngine
from zo_ds.errors import ConfigError, MachineError
from zo_ds.stores import shards
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore

SETTINGS = {"num_directions": 4, "lr": 5e-3, "weight_decay": 0.1, "run_seed": 11}


def open_engine(model: nn.Module, store: str = "resident", noise: str = "dense", **options: Any) -> ZOEngine:
    config = {"zero_optimization": STORES[store], "zeroth_order": {**SETTINGS, "noise": noise}}
    return zo_ds.initialize(model, config, **options)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered weights are copies, as on CUDA; on a CPU in a world of one they are the shards themselves."""
    from deepspeed.runtime.zero import partition_parameters

    for kind in (partition_parameters.NoGatherHandle, partition_parameters.NoGatherCoalescedHandle):
        original = kind.__init__

        def copying(self: Any, arg: Any, original: Any = original) -> None:
            original(self, arg)
            for parameter in arg if isinstance(arg, list) else [arg]:
                parameter.data = parameter.data.clone()

        monkeypatch.setattr(kind, "__init__", copying)


def trace(engine: ZOEngine, batches: list[Any]) -> list[Any]:
    """All that a run does to be compared bit for bit."""
    steps = [engine.step(batch) for batch in batches]
    assert all(step.skip is None and step.coefficients.abs().max() > 0 for step in steps)
    return [(s.clean_loss, s.spread, s.coefficients.tolist()) for s in steps] + [engine.digest()]


def check_stores(build: Callable[[], nn.Module], batches: list[Any], noise: str = "dense", **options: Any) -> None:
    wanted = trace(open_engine(build(), "resident", noise, **options), batches)
    for store in ("zero3", "zero3-cpu"):
        assert trace(open_engine(build(), store, noise, **options), batches) == wanted


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("noise", ["dense", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sharded_and_offloaded_weights_take_the_same_steps(dtype: torch.dtype, noise: str) -> None:
    batches = [[zo_batch(seed=2 * step), zo_batch(seed=2 * step + 1)] for step in range(6)]
    check_stores(lambda: tiny_model("llama", dtype=dtype), batches, noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_where_gathered_weights_are_the_shards(dtype: torch.dtype) -> None:
    check_stores(lambda: tiny_model("llama", dtype=dtype), [zo_batch(seed=step) for step in range(6)])


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("family", ["opt", "bert", "gpt2"])
def test_other_families_take_the_same_steps(family: str) -> None:
    check_stores(lambda: tiny_model(family), [zo_batch(family, seed=step) for step in range(6)], "factored")


class Tied(nn.Module):
    """Reads its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        logits = F.linear(self.inner(self.embedding(ids)), self.embedding.weight)
        return F.cross_entropy(logits, ids, reduction="none")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(F.one_hot(ids[None] % 4, 4).float())[0][0].mean(1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.sin(ids[None, :, None] * torch.arange(1.0, 9.0))
        return self.inner(x, x, x)[0][0].pow(2).mean(1)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("kind", [Tied, Recurrent, Attending])
def test_awkward_modules_take_the_same_steps(kind: type[nn.Module]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return kind()

    check_stores(build, [torch.arange(start, start + 5) % 8 for start in range(6)], loss_fn=lambda m, ids: m(ids))


@pytest.mark.parametrize("store", STORES)
def test_a_failed_forward_leaves_the_weights_usable(store: str) -> None:
    engine = open_engine(tiny_model("llama"), store)
    reference = trace(open_engine(tiny_model("llama")), [zo_batch()])
    bad = {**zo_batch(), "input_ids": torch.full((4, 8), 10_000)}
    for _ in range(2):
        with pytest.raises(IndexError):
            engine.step(bad)
    assert engine.steps_done == 0
    assert trace(engine, [zo_batch()]) == reference


@pytest.mark.parametrize(
    "store",
    [
        "resident",
        "zero3",
    ],
)
@pytest.mark.usefixtures("copies")
def test_weights_can_be_read_and_written_right_after_a_failed_forward(store: str) -> None:
    engine, other = open_engine(tiny_model("llama"), store), open_engine(tiny_model("llama", seed=2))
    digest = engine.digest()
    for used in (engine.digest, lambda: engine.load_weights(weights_of(other))):
        with pytest.raises(IndexError):
            engine.step({**zo_batch(), "input_ids": torch.full((4, 8), 10_000)})
        used()
        assert engine.digest() in (digest, other.digest())
    assert torch.equal(engine.losses(zo_batch()), other.losses(zo_batch()))
    assert engine.digest() == other.digest()


def storages() -> set[int]:
    """Where the elements of all tensors are that Python knows of."""
    gc.collect()
    places = set()
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):  # asks no proxy that other tests left
            with suppress(RuntimeError):  # sparse ones have no storage
                places.add(found.untyped_storage().data_ptr())
    return places


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("store", ["zero3", "zero3-cpu"])
def test_a_closed_store_lets_go_of_the_weights_although_deepspeed_keeps_the_module(store: str) -> None:
    engine = open_engine(tiny_model("llama"), store)
    engine.step(zo_batch())
    parameters: list[Any] = list(engine.store.module.parameters())
    places = {parameter.ds_tensor.untyped_storage().data_ptr() for parameter in parameters}
    assert places & storages()
    engine.store.close()
    assert not places & storages()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_views_and_digest_are_those_of_the_plain_model(store: str, dtype: torch.dtype) -> None:
    plain = tiny_model("opt", dtype=dtype)
    infos = trainable_parameters(plain)
    wanted = {name: value.clone() for name, value in plain.state_dict().items()}
    digest = ResidentStore(plain, infos, open_engine(tiny_model("llama")).store.structure).digest()
    engine = open_engine(tiny_model("opt", dtype=dtype), store)
    assert engine.digest() == digest
    for _ in range(3):
        engine.losses(zo_batch())
    found = weights_of(engine)
    assert wanted.keys() - found.keys() <= {"lm_head.weight"}  # tied
    assert all(torch.equal(wanted[name], value) and wanted[name].dtype == value.dtype for name, value in found.items())


@pytest.mark.parametrize("store", STORES)
def test_load_weights(store: str) -> None:
    engine, other = open_engine(tiny_model("llama", seed=1), store), open_engine(tiny_model("llama", seed=2))
    engine.step(zo_batch())
    weights = weights_of(other)
    with pytest.raises(KeyError, match=r"model\.norm\.weight"):
        engine.load_weights({name: value for name, value in weights.items() if name != "model.norm.weight"})
    engine.load_weights({**weights, "another.weight": torch.zeros(3)})
    assert engine.digest() == other.digest()
    assert torch.equal(engine.losses(zo_batch()), other.losses(zo_batch()))


@pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
def test_weights_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    engine = open_engine(nn.Linear(4, 3), loss_fn=lambda m, x: m(x).mean(1))
    with pytest.raises((ValueError, RuntimeError, ConfigError)):
        engine.load_weights({"weight": torch.ones(shape), "bias": torch.ones(3)})


def check_saved(engine: ZOEngine, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    inputs = {key: value for key, value in zo_batch().items() if key != "labels"}
    half = any(p.dtype == torch.bfloat16 for p in loaded.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        logits = loaded(**inputs).logits
    # Products of the engine come from another library than the plain model's.
    found = engine.call(lambda m, b: m(**b).logits, inputs)
    assert torch.allclose(logits, found, rtol=1e-5, atol=1e-6) if not half else torch.equal(logits, found)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


@pytest.mark.parametrize("store", ["resident", "zero3-cpu"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_saved_model_loads_and_gives_the_same_logits(family: str, store: str, tmp_path: Path) -> None:
    engine = open_engine(tiny_model(family), store)
    for target in (tmp_path / "deep" / "model", tmp_path / "deep" / "model"):
        engine.step(zo_batch())
        engine.save_pretrained(target)
        check_saved(engine, target)
    names = sorted(path.name for path in (tmp_path / "deep" / "model").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


@pytest.mark.parametrize("store", ["resident", "zero3-cpu"])
@pytest.mark.parametrize("limit", [1, 3000])
def test_large_models_are_saved_in_shards(
    store: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    engine = open_engine(tiny_model("llama"), store)
    engine.save_pretrained(tmp_path / "model")
    check_saved(engine, tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= limit or all(len(load_file(f)) == 1 for f, n in zip(files, sizes, strict=True) if n > limit)


def test_16_bit_model_is_saved_in_its_dtypes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    engine = open_engine(tiny_model("llama", dtype=torch.bfloat16), "zero3")
    engine.step(zo_batch())
    engine.save_pretrained(tmp_path / "model")
    saved, held = load_file(tmp_path / "model" / "model.safetensors"), weights_of(engine)
    assert held.keys() == saved.keys()
    assert "lm_head.weight" not in saved
    assert all(torch.equal(saved[name], held[name]) and saved[name].dtype == held[name].dtype for name in saved)


def test_full_disk_keeps_the_older_model(tmp_path: Path) -> None:
    older = tmp_path / "model"
    older.mkdir()
    (older / "kept").write_text("old")
    engine = open_engine(tiny_model("llama"))
    with small_files(4096), pytest.raises(MachineError, match="cannot save the model"):
        engine.save_pretrained(older)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]


def test_trained_parameters() -> None:
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    model.transformer.wpe.requires_grad_(False)
    infos = trainable_parameters(model)
    assert [info.name for info in infos.values()] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert "lm_head.weight" not in {info.name for info in infos.values()}
    assert all(p.dtype == (torch.bfloat16 if p.dim() > 1 else torch.float32) == i.dtype for p, i in infos.items())
    assert model.transformer.wpe.weight.dtype == torch.bfloat16


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameters"):
        trainable_parameters(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ConfigError, match=r"cannot train a parameter of dtype torch\.float64"):
        trainable_parameters(nn.Linear(2, 2).double())


def test_names_with_the_same_noise_are_refused() -> None:
    seen: dict[bytes, str] = {}
    for number in range(2**19):
        name = f"w{number}"
        first = seen.setdefault(hashlib.sha256(name.encode()).digest()[:4], name)
        if first != name:
            break
    model = nn.Module()
    for each in (first, name):
        model.register_parameter(each, nn.Parameter(torch.zeros(2)))
    with pytest.raises(ConfigError, match=f"'{first}' and '{name}' share the noise id"):
        trainable_parameters(model)
