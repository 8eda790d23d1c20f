"""Models without weights, on the meta device, for the planner: known sizes by name, anything else from its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from zo_ds.errors import DataError


def _opt(layers: int, heads: int, hidden: int, *, embedding: int | None = None) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": embedding or hidden,
        "max_position_embeddings": 2048,
        # The 350M model alone normalises after each sublayer.
        "do_layer_norm_before": embedding is None,
        "tie_word_embeddings": True,
    }


def _llama3(layers: int, heads: int, hidden: int, widest: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "hidden_size": hidden,
        "intermediate_size": widest,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


KNOWN: dict[str, dict[str, Any]] = {
    # The config.json of facebook/opt-*; table 1 of the OPT paper (arXiv 2205.01068) for 175B, which is not on the hub.
    "opt-125m": _opt(12, 12, 768),
    "opt-350m": _opt(24, 16, 1024, embedding=512),
    "opt-1.3b": _opt(24, 32, 2048),
    "opt-2.7b": _opt(32, 32, 2560),
    "opt-6.7b": _opt(32, 32, 4096),
    "opt-13b": _opt(40, 40, 5120),
    "opt-30b": _opt(48, 56, 7168),
    "opt-66b": _opt(64, 72, 9216),
    "opt-175b": _opt(96, 96, 12288),
    # meta-llama/Meta-Llama-3-8B and -70B.
    "llama-3-8b": _llama3(32, 32, 4096, 14336),
    "llama-3-70b": _llama3(80, 64, 8192, 28672),
    # microsoft/phi-2.
    "phi-2": {
        "model_type": "phi",
        "vocab_size": 51200,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
        "tie_word_embeddings": False,
    },
}
"""Architecture constants of published models."""


def meta_model(name_or_path: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A causal LM whose parameters have shapes and no memory, in evaluation mode; nothing is downloaded.

    Args:
        name_or_path: a name in `KNOWN`, or a folder with a config.json.
        dtype: of all its parameters.

    Raises:
        DataError: it is neither, or transformers cannot build it.
    """
    known = KNOWN.get(name_or_path.lower())
    try:
        if known is not None:
            settings = dict(known)
            config: Any = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        else:
            if not (Path(name_or_path) / "config.json").is_file():
                raise DataError(
                    "there is no such model",
                    where=name_or_path,
                    why=f"known are {', '.join(KNOWN)}; and folders with a config.json",
                    remedy="give one of these names, or the folder of a model",
                )
            config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        with torch.device("meta"):
            build: Any = transformers.AutoModelForCausalLM.from_config
            model: nn.Module = build(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError("cannot build the model", where=name_or_path, why=str(error).splitlines()[0]) from error
    return model.eval()
