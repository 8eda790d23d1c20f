"""Tiny random models of many transformers families, one of each shape of block that the batched forward meets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.conftest import VOCABULARY
from zo_ds.forward.batched import BatchedEvaluator
from zo_ds.forward.displacement import Displacement, Place
from zo_ds.forward.evaluator import LossFunction
from zo_ds.forward.joining import PassSize
from zo_ds.forward.perturber import Perturber
from zo_ds.forward.sequential import SequentialEvaluator
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.stores.base import trainable_parameters

WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 1, **WIDTH}
DECODER = {**COMMON, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}
OPT = {"ffn_dim": 24, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 1, "hidden_size": 16}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 2}
NARROW = {"word_embed_proj_dim": 8, "do_layer_norm_before": False}
ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "opt-125m": ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 16}),
    "opt-350m": ("OPTConfig", "OPTForCausalLM", {**OPT, **NARROW}),
    "roberta-mlm": ("RobertaConfig", "RobertaForMaskedLM", COMMON),
    "roberta-classes": ("RobertaConfig", "RobertaForSequenceClassification", {**COMMON, "num_labels": 3}),
    "bert-mlm": ("BertConfig", "BertForMaskedLM", COMMON),
    "bert-classes": ("BertConfig", "BertForSequenceClassification", {**COMMON, "num_labels": 3}),
    "llama-classes": ("LlamaConfig", "LlamaForSequenceClassification", {**DECODER, "num_labels": 3}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**COMMON, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, **ALTERNATING, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**DECODER, **ALTERNATING, "query_pre_attn_scalar": 8}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**COMMON, "rotary_pct": 0.5}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**DECODER, **EXPERTS, **SHARED}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**DECODER, **EXPERTS, "decoder_sparse_step": 1}),
}
MOE = {"mixtral", "qwen2-moe", "qwen3-moe"}


def family(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The same random weights every time; every matrix and vector differs from zero and one."""
    import transformers

    config, kind, settings = SPECS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**{**settings, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().to(dtype)


def batch_for(name: str, examples: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Inputs with labels, the second half of them padded."""
    generator = torch.Generator().manual_seed(examples)
    ids = torch.randint(3, VOCABULARY, (examples, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[(examples + 1) // 2 :, length - length // 4 :] = 0
    ids.masked_fill_(mask == 0, 1)
    classes = torch.randint(0, 3, (examples,), generator=generator)
    labels = classes if name.endswith("classes") else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def per_example(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses of each example, summed in fp64 from the logits so that no rounding of the mean hides a difference."""
    logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.double()
    if batch["labels"].dim() == 1:
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    # Soft prompts come before the tokens.
    logits = logits[:, -batch["labels"].shape[1] :]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    return each.sum(1) / (batch["labels"] >= 0).sum(1)


class Pair(NamedTuple):
    """A model under both evaluators."""

    model: nn.Module
    infos: dict[nn.Parameter, ParamInfo]
    batched: BatchedEvaluator
    sequential: SequentialEvaluator
    structure: NoiseStructure


def pair(
    model: nn.Module,
    loss_fn: LossFunction = per_example,
    structure: NoiseStructure = NoiseStructure.DENSE,
    autocast: torch.dtype | None = None,
    **size: Any,
) -> Pair:
    infos = trainable_parameters(model.eval())
    perturber = Perturber(model, infos, structure)
    sequential = SequentialEvaluator(model, perturber, loss_fn, autocast)
    batched = BatchedEvaluator(sequential, pass_size=PassSize(**size))
    return Pair(model, infos, batched, sequential, structure)


def fzoo(directions: int, eps: float = 1e-2, seed: int = 7) -> list[Place]:
    return [None, *(Displacement(seed, number, eps) for number in range(directions))]


def mezo(directions: int, eps: float = 1e-2, seed: int = 7) -> list[Place]:
    return [Displacement(seed, number, side * eps) for side in (1, -1) for number in range(directions)]


def gap(found: Pair, batch: Any, places: list[Place]) -> float:
    """The largest relative difference of a loss between the two evaluators, after a check that places differ."""
    batched, sequential = found.batched.losses(batch, places), found.sequential.losses(batch, places)
    assert batched.shape == sequential.shape
    assert batched.dtype == torch.float64
    assert len({tuple(row) for row in sequential.tolist()}) == len(set(places))
    return float(((batched - sequential).abs() / sequential.abs().clamp(min=1e-3)).max())
