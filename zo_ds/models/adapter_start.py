"""What an adapter starts from: a pure function of its parameters' names, the configuration and the base weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.maths.noise import param_id, rounding_bits, splitmix64, step_seed
from zo_ds.tensor_files import Source

NOISE_STD = 0.02
"""Of a soft prompt that starts from noise: as embeddings do in most models."""
PROMPT = "prompt_embeddings"
"""peft's name for what prefix and prompt tuning train."""


def first_values(shapes: Mapping[str, Sequence[int]], seed: int, rows: Callable[[], Tensor] | None = None) -> Source:
    """What fills the parameters of a new adapter.

    LoRA's A is uniform within 1 / sqrt(fan in), as peft draws it (kaiming, a = sqrt(5)), and B zero; IA3's factors are
    one: either is the base model at first. Nothing is drawn from a generator.

    Args:
        shapes: of the parameters, by canonical name.
        seed: of what is drawn.
        rows: gives a soft prompt; None: noise.

    Raises:
        ConfigError: a parameter is of a kind that has no rule here.
    """
    for name in shapes:
        if _kind(name) is None:
            raise ConfigError(
                f"there is no rule for the first values of '{name}'",
                where="peft.method",
                remedy="use lora, ia3, prefix, prompt or bias, or go on from a saved adapter with peft.path",
            )

    def fill(name: str, start: int, out: Tensor) -> None:
        shape, kind = shapes[name], _kind(name)
        if kind == "A":
            out.copy_(uniform(name, seed, start, out.numel()) / math.sqrt(math.prod(shape[1:])))
        elif kind == "prompt" and rows is not None:
            out.copy_(rows().reshape(-1)[start : start + out.numel()])
        elif kind in ("prompt", "embedding"):
            std = NOISE_STD if kind == "prompt" else 1.0
            out.copy_(uniform(name, seed, start, out.numel()) * (math.sqrt(3) * std))
        else:
            out.fill_(1.0 if kind == "factor" else 0.0)

    return fill


def _kind(name: str) -> str | None:
    ends = {
        ".lora_A.weight": "A",
        ".lora_B.weight": "zero",
        ".lora_embedding_A": "zero",
        ".lora_embedding_B": "embedding",
        ".ia3_l": "factor",
    }
    return "prompt" if name == PROMPT else next((kind for end, kind in ends.items() if name.endswith(end)), None)


def uniform(name: str, seed: int, start: int, count: int) -> Tensor:
    """Elements ``start ...`` of a parameter's own sequence in (-1, 1), fp64 [count], from 32 bits each.

    The bits are those of stochastic rounding before step -1, which no run takes.
    """
    halves = rounding_bits(step_seed(seed, -1), param_id(name), 2 * start, 2 * count).view(-1, 2).double()
    return (halves[:, 0] * 2**16 + halves[:, 1] + 0.5) * 2.0**-31 - 1


def token_ids(tokenizer: Any, text: str | None, count: int, vocabulary: int, seed: int) -> list[int]:
    """The real tokens that a soft prompt starts from.

    Args:
        tokenizer: of the model.
        text: as often as needed; None: tokens from anywhere, none of them special.
        count: how many.
        vocabulary: of the model.
        seed: of the choice.

    Raises:
        ConfigError: the text has no tokens.
    """
    if text is not None:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not found:
            raise ConfigError("the text has no tokens", where=f"peft.start_text = {text!r}", remedy="give some words")
        return [found[i % len(found)] for i in range(count)]
    special = set(tokenizer.all_special_ids)
    usable = [token for token in range(min(vocabulary, len(tokenizer))) if token not in special] or [0]
    return [usable[splitmix64(step_seed(seed, -1) + i) % len(usable)] for i in range(count)]


def keys_and_values(model: Any, ids: Sequence[int]) -> dict[str, Tensor]:
    """A prefix of real activations: the keys and values of some tokens at the start of a sequence, in every layer.

    That is where MeZO's prefix tuning starts (arXiv 2305.17333, appendix E.3), without reparametrisation: the model
    then gives what it would give behind these tokens.

    Args:
        model: a prefix-tuning model of peft.
        ids: one token for each of its virtual tokens.

    Returns:
        The parameter by name, fp32; nothing if the model has no key-value cache of that shape.
    """
    settings = model.peft_config[model.active_adapter]
    base: Any = model.get_base_model()
    shape = (len(ids), settings.num_layers * 2 * settings.token_dim)
    body: Any = getattr(base, base.base_model_prefix, base)
    device = next((t.device for t in base.buffers()), next(base.parameters()).device)
    inputs = torch.tensor([list(ids)], device=device)
    cache = transformers.DynamicCache()
    try:
        body(input_ids=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, use_cache=True)
        pairs = [half[0].float() for layer in cache.layers for half in (layer.keys, layer.values)]
        # [layers * 2, heads, tokens, width] -> [tokens, layers * 2 * heads * width]
        prefix = torch.stack(pairs).permute(2, 0, 1, 3).reshape(len(ids), -1)
    except (TypeError, ValueError, AttributeError):
        return {}
    return {PROMPT: prefix.cpu()} if tuple(prefix.shape) == shape else {}


def embedding_rows(read: Source, name: str, width: int, ids: Sequence[int]) -> Tensor:
    """Rows of an embedding table, fp32 [ids, width], read one by one.

    Args:
        read: gives the base weights.
        name: of the table, in the base model.
        width: of a row.
        ids: which rows.
    """
    rows = torch.empty(len(ids), width)
    for row, token in zip(rows, ids, strict=True):
        read(name, token * width, row)
    return rows


def word_embeddings(module: nn.Module) -> tuple[str, int]:
    """Name and width of a model's table of token embeddings.

    Raises:
        ConfigError: it has none.
    """
    find: Any = getattr(module, "get_input_embeddings", None)
    try:
        table = find()
        name = next(name for name, parameter in module.named_parameters() if parameter is table.weight)
    except (TypeError, AttributeError, NotImplementedError, StopIteration) as error:
        raise ConfigError(
            "the model has no table of token embeddings",
            where="peft.method = prompt",
            remedy="choose another method: lora, ia3 or prefix",
        ) from error
    return name, int(table.weight.shape[1])
