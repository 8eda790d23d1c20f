"""Checkpoints of every kind, what is refused, and what a message says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, RobertaConfig, RobertaForMaskedLM

from tests.launch import jobs
from zo_ds.config.schema import ModelConfig
from zo_ds.errors import ConfigError, DataError
from zo_ds.models.load import LoadedModel, load_model, model_source
from zo_ds.stores.resident import fill_in_place

ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return jobs.make_model(tmp_path / "model")


def with_encoder(folder: Path, model: nn.Module) -> Path:
    """Another model beside the tokenizer."""
    model.save_pretrained(folder)
    return folder


def load(folder: Path | str, labels: int = 2, **settings: Any) -> LoadedModel:
    loaded = load_model(ModelConfig(path=str(folder), **settings), labels)
    fill_in_place(loaded.module, loaded.source)
    return loaded


def refused(path: Path | str, labels: int = 2, where: str = "", **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path, labels, **settings)
    assert caught.value.exit_code == 3
    assert caught.value.where == (where or f"model.path = {path}")
    assert caught.value.remedy
    return caught.value


def test_a_causal_model(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.head, loaded.max_tokens) == ("causal_lm", 32)
    assert not loaded.module.training
    assert loaded.tokenizer.is_fast
    weights = dict(loaded.module.named_parameters())
    assert weights["model.embed_tokens.weight"] is loaded.module.lm_head.weight
    assert all(weight.count_nonzero() > 0 and weight.dtype == torch.float32 for weight in weights.values())


def test_a_masked_model(folder: Path) -> None:
    loaded = load(with_encoder(folder, BertForMaskedLM(BertConfig(**ENCODER))))
    assert (loaded.head, type(loaded.module), loaded.max_tokens) == ("masked_lm", BertForMaskedLM, 24)


def test_a_classifier_keeps_its_head(folder: Path) -> None:
    saved = BertForSequenceClassification(BertConfig(**ENCODER, num_labels=3))
    loaded = load(with_encoder(folder, saved), 3)
    assert loaded.head == "sequence_classification"
    assert torch.equal(loaded.module.classifier.weight, saved.classifier.weight)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_new_head_starts_at_zero(folder: Path, labels: int) -> None:
    saved = BertForMaskedLM(BertConfig(**ENCODER))
    module = load(with_encoder(folder, saved), labels, head="sequence_classification").module
    weights = dict(module.named_parameters())
    new = {name for name in weights if name.startswith(("classifier", "bert.pooler"))}
    assert weights["classifier.weight"].shape == (labels, 16)
    assert all(weights[name].count_nonzero() == 0 for name in new)
    kept = dict(saved.named_parameters())
    assert all(torch.equal(weights[name], kept[name]) for name in weights.keys() - new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_matrices(folder: Path, dtype: torch.dtype) -> None:
    module = load(folder, dtype=str(dtype).removeprefix("torch.")).module
    assert {weight.dtype for weight in module.parameters() if weight.dim() > 1} == {dtype}


def test_the_tokenizer_may_set_the_limit(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 9}))
    assert load(folder).max_tokens == 9


def test_roberta_takes_as_many_tokens_as_it_says(folder: Path) -> None:
    """Its positions start behind the padding token's number, so some of them are never reached."""
    loaded = load(with_encoder(folder, RobertaForMaskedLM(RobertaConfig(**ENCODER, pad_token_id=1))))
    with torch.no_grad():
        logits = loaded.module(torch.full((1, loaded.max_tokens), 5)).logits
    assert logits.isfinite().all()


def test_a_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "no", tmp_path / "file", "./no", "../no", "~/no-such-model", "a/b/c", "my model", "a//b"):
        assert refused(path).what == "there is no such model folder"


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_source("facebook/opt-125m") == "facebook/opt-125m"
    (tmp_path / "facebook" / "opt-125m").mkdir(parents=True)
    assert Path(model_source("facebook/opt-125m")).is_dir()
    with pytest.raises(ConfigError, match="no-such-model"):
        model_source("catalog:no-such-model")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no-such-model"])
def test_a_hub_model_that_is_not_in_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = refused(name)
    assert error.why
    assert "filled cache" in error.remedy


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "opened",)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    assert "safetensors" in str(refused(folder))
    assert not (folder / "opened").exists()


def test_code_in_a_checkpoint_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'opened')!r}, 'w')\nConfig = None\n")
    settings = json.loads((folder / "config.json").read_text())
    settings.update(model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (folder / "config.json").write_text(json.dumps(settings))
    refused(folder)
    assert not (folder / "opened").exists()


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refused(tmp_path).what == "cannot load the model"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no-such-type"}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_damaged_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("content", [b"short", b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense" * 9])
def test_damaged_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, where=str(folder / "model.safetensors"))


def test_weights_of_another_shape(folder: Path) -> None:
    with_encoder(folder, BertForSequenceClassification(BertConfig(**ENCODER, num_labels=3)))
    assert "3 classes, the task has 2" in refused(folder, 2, where="task.label_words").what
