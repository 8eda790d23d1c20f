"""The catalog's real models and data, downloaded into the session's cache and used."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from zo_ds.data.catalog import DATASETS, dataset_dir
from zo_ds.errors import MachineError
from zo_ds.fetch import fetch
from zo_ds.models.catalog import model_dir

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

TEXT = (
    "The capital of France is Paris. Water is made of hydrogen and oxygen, "
    "and it boils at 100 degrees Celsius. The Earth goes around the Sun once a year."
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return model_dir("smollm2-135m-instruct")


def test_download_is_kept_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZO_DS_CACHE", str(tmp_path))
    package = DATASETS["vader-movie"].package
    for _ in range(2):
        path = fetch(package)
        assert path == tmp_path / "downloads" / package.filename
        assert hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
        assert {p.name.removeprefix(path.name) for p in path.parent.iterdir()} == {"", ".lock", ".ok"}
        path.write_bytes(path.read_bytes()[:-1])
    fetch(package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch(package).stat().st_size == package.size


def test_without_a_registry_only_a_right_copy_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = DATASETS["vader-movie"].package
    data = fetch(package).read_bytes()
    target = tmp_path / "downloads" / package.filename
    for name, value in (("ZO_DS_CACHE", str(tmp_path)), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="zo_ds prepare CONFIG") as caught:
        dataset_dir("vader-movie")
    for part in (package.requirement, "No matching distribution found", str(target)):
        assert part in str(caught.value)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["vader-movie.lock"]
    target.write_bytes(bytes(len(data)))
    with pytest.raises(MachineError, match="another size or sha256"):
        fetch(package)
    target.write_bytes(data)
    assert fetch(package) == target
    assert (dataset_dir("vader-movie") / "train.jsonl").exists()


def test_smollm2_is_a_trained_model_with_tied_embeddings(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss.item())
    assert perplexity < 12


def test_smollm2_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    pinned = {
        "In 2024 it cost $1,250.75!": [
            788,
            216,
            34,
            32,
            34,
            36,
            357,
            1708,
            1885,
            33,
            28,
            34,
            37,
            32,
            30,
            39,
            37,
            17,
        ],
        "<|im_start|>user\nnaïve café<|im_end|>": [1, 4093, 198, 3546, 46494, 37366, 2],
    }
    for text, ids in pinned.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert isinstance(chat, str)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_smollm2_folder(smollm2: Path) -> None:
    names = {path.name for path in smollm2.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "NOTICE"),
    }
    assert "Apache-2.0" in (smollm2 / "NOTICE").read_text(encoding="utf-8")
    # The files have to be readable by whoever shares the cache, not by their owner only.
    assert len({path.stat().st_mode for path in smollm2.iterdir()}) == 1


def test_minilm_embeds_by_meaning() -> None:
    folder = model_dir("all-minilm-l6-v2")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    same, other = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    assert same > 0.5 > 0.25 > other


def test_vader_movie_sizes() -> None:
    folder = dataset_dir("vader-movie")
    texts: list[str] = []
    for part, negative, positive in (("train", 3594, 3595), ("dev", 442, 457), ("test", 447, 486)):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text("utf-8").splitlines()]
        assert Counter(row["label"] for row in rows) == {0: negative, 1: positive}
        assert all(abs(row["rating"]) > 1 and row["label"] == (row["rating"] > 0) for row in rows)
        texts += [row["text"] for row in rows]
    assert len(set(texts)) == len(texts) == 9021
    assert not any("Ã" in text for text in texts)
    assert any("cliché" in text for text in texts)
