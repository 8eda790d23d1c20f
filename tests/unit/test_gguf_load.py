"""Models in GGUF files: what transformers decodes is a plain model, and what it cannot is said clearly."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from zo_ds.config.schema import ModelConfig
from zo_ds.errors import ConfigError, DataError
from zo_ds.models import catalog
from zo_ds.models.gguf import read_gguf
from zo_ds.models.load import LoadedModel, load_model
from zo_ds.stores.resident import fill_in_place

TOKENS = ["<s>", "</s>", "<pad>", *"abcdefgh", "ab", "cd", "Ġ"]
MERGES = ["a b", "c d"]
ALIGNMENT = 32
WITHOUT_PACKAGE = pytest.mark.skipif(find_spec("gguf") is not None, reason="the package gguf is installed")
OWN_READER = find_spec("transformers.integrations.gguf.gguf_config_mapping") is not None

TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 2,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(item: Any) -> bytes:
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
    return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)


def write(path: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A file of float32 tensors, as its format says (version 3)."""
    keys = b"".join(text(key) + value(item) for key, item in settings.items())
    table, data = b"", b""
    for name, tensor in tensors.items():
        dims = struct.pack(f"<I{tensor.dim()}Q", tensor.dim(), *reversed(tensor.shape))
        table += text(name) + dims + struct.pack("<IQ", 0, len(data))
        data += tensor.float().numpy().tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)) + keys + table
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data)
    return path


LFM2_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.embedding_norm.": "token_embd_norm.",
    "model.layers.": "blk.",
    ".operator_norm.": ".attn_norm.",
    ".self_attn.q_proj.": ".attn_q.",
    ".self_attn.k_proj.": ".attn_k.",
    ".self_attn.v_proj.": ".attn_v.",
    ".self_attn.out_proj.": ".attn_output.",
    ".self_attn.q_layernorm.": ".attn_q_norm.",
    ".self_attn.k_layernorm.": ".attn_k_norm.",
    ".feed_forward.w1.": ".ffn_gate.",
    ".feed_forward.w3.": ".ffn_up.",
    ".feed_forward.w2.": ".ffn_down.",
    ".conv.in_proj.": ".shortconv.in_proj.",
    ".conv.out_proj.": ".shortconv.out_proj.",
    ".conv.conv.": ".shortconv.conv.",
}


def lfm2(path: Path) -> nn.Module:
    """A tiny LFM2 with random weights, and the file that holds it: transformers reads these without the package."""
    config = transformers.Lfm2Config(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"],
        conv_L_cache=3,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for ours, theirs in LFM2_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.squeeze(1) if name.endswith("shortconv.conv.weight") else tensor
    settings = {
        "general.architecture": "lfm2",
        "lfm2.context_length": 64,
        "lfm2.embedding_length": 16,
        "lfm2.feed_forward_length": 24,
        "lfm2.block_count": 2,
        "lfm2.attention.head_count": 2,
        "lfm2.attention.head_count_kv": [0, 1],
        "lfm2.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "lfm2.shortconv.l_cache": 3,
        "lfm2.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **TOKENIZER,
    }
    write(path, settings, tensors)
    whole: nn.Module = model
    return whole


def llama(path: Path) -> None:
    """A tiny Llama with random weights under the names of its file."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layer = {"attn_norm": (16,), "ffn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16)}
    layer |= {"attn_output": (16, 16), "ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
    tensors = {"token_embd.weight": random(len(TOKENS), 16), "output_norm.weight": random(16)}
    for number in range(2):
        tensors |= {f"blk.{number}.{name}.weight": random(*shape) for name, shape in layer.items()}
    settings = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.vocab_size": len(TOKENS),
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 4,
        **TOKENIZER,
    }
    write(path, settings, tensors)


def load(path: Path, **settings: Any) -> LoadedModel:
    return load_model(ModelConfig(path=str(path.parent), gguf=path.name, **settings), 2)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(2, 12)[None]).logits
    return found


needs_own_reader = pytest.mark.skipif(not OWN_READER, reason="this transformers reads no GGUF file by itself")


@needs_own_reader
def test_a_model_in_a_file(tmp_path: Path) -> None:
    model = lfm2(tmp_path / "model" / "tiny.gguf")
    loaded = load(tmp_path / "model" / "tiny.gguf")
    assert (loaded.head, loaded.max_tokens, loaded.source) == ("causal_lm", 64, None)
    assert not loaded.module.training
    weights = dict(loaded.module.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())
    assert torch.equal(logits(loaded.module), logits(model))
    assert loaded.tokenizer("abcd")["input_ids"] == [TOKENS.index("ab"), TOKENS.index("cd")]


@needs_own_reader
def test_it_can_be_saved_and_is_an_ordinary_model_then(tmp_path: Path) -> None:
    model = lfm2(tmp_path / "model" / "tiny.gguf")
    loaded = load(tmp_path / "model" / "tiny.gguf")
    loaded.module.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert "gguf" not in (tmp_path / "saved" / "config.json").read_text()
    again = load_model(ModelConfig(path=str(tmp_path / "saved")), 2)
    fill_in_place(again.module, again.source)
    assert torch.equal(logits(again.module), logits(model))
    assert again.tokenizer("abcd")["input_ids"] == loaded.tokenizer("abcd")["input_ids"]


@needs_own_reader
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_matrices(tmp_path: Path, dtype: str) -> None:
    model = lfm2(tmp_path / "model" / "tiny.gguf")
    module = load(tmp_path / "model" / "tiny.gguf", dtype=dtype).module
    wanted = dict(model.named_parameters())
    matrices = {name: weight for name, weight in module.named_parameters() if weight.dim() > 1}
    assert all(torch.equal(weight, wanted[name].to(getattr(torch, dtype))) for name, weight in matrices.items())


@needs_own_reader
def test_a_file_of_that_name_elsewhere_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lfm2(tmp_path / "model" / "tiny.gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load(Path("model/tiny.gguf")).module), logits(model))


@needs_own_reader
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model" / "tiny.gguf"
    lfm2(path)
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"text" * 99, *(whole[:size] for size in range(0, len(whole), len(whole) // 40))):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load(path)
        assert caught.value.exit_code == 3
        assert caught.value.why


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError) as caught:
        load(tmp_path / "model" / "no.gguf")
    assert "no.gguf" in caught.value.why


@WITHOUT_PACKAGE
def test_the_package_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    llama(tmp_path / "model" / "tiny.gguf")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "model" / "tiny.gguf")
    assert (caught.value.exit_code, caught.value.where) == (2, "model.gguf = tiny.gguf")
    assert caught.value.remedy == "pip install gguf"


def test_both_readers_agree(tmp_path: Path) -> None:
    """The catalogue's own, and transformers with the package."""
    pytest.importorskip("gguf")
    path = tmp_path / "model" / "tiny.gguf"
    llama(path)
    loaded = load(path)
    ours = {name: torch.from_numpy(array) for name, array in catalog._llama_weights(read_gguf(path))}
    theirs = dict(loaded.module.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert (loaded.head, loaded.max_tokens) == ("causal_lm", 64)
