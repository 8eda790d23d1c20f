"""Greedy decoding of a batch of prompts, row by row independent, with a key-value cache where the model has one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_ds.forward.backbone import without_adapters


class Prompts(NamedTuple):
    """Prompts padded on the left, so that all of them go on at the same column.

    Attributes:
        input_ids: int64 [rows, tokens].
        attention_mask: int64 [rows, tokens].
        numbers: int64 [rows], which example a row is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    numbers: Tensor

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        return Prompts(*(tensor.to(device) for tensor in self))


def pad_left(rows: Sequence[Sequence[int]], numbers: Sequence[int], pad_id: int) -> Prompts:
    """Rows of token ids as `Prompts`; the padding is masked."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[number, width - len(row) :] = 1
    return Prompts(ids, mask, torch.tensor(numbers))


def greedy(
    model: nn.Module, prompts: Prompts, new_tokens: int, stops: Sequence[int], *, lockstep: bool = False
) -> Tensor:
    """The likeliest token after the other, until every row has said one that ends it.

    Args:
        model: a causal LM of transformers, with or without adapters.
        prompts: see `Prompts`.
        new_tokens: the most a row gets.
        stops: tokens that end a row.
        lockstep: call the model as often as for the longest rows there can be, whatever these say.

    Returns:
        int64 [rows, up to new_tokens]; behind its end a row repeats its last stop.
    """
    inner: Any = without_adapters(model)
    known = inspect.signature(inner.forward).parameters
    # Adapters that bring keys and values of their own would have to be told apart from the cache.
    soft = any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values())
    cached = "past_key_values" in known and "use_cache" in known and not soft
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "use_cache" in known:
        extra["use_cache"] = cached
    ids, mask, fresh = prompts.input_ids, prompts.attention_mask, prompts.input_ids
    endings = torch.tensor(stops, dtype=torch.int64, device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    said: list[Tensor] = []
    while len(said) < new_tokens and (lockstep or not bool(done.all())):
        if "position_ids" in known and not soft:
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        out = model(input_ids=fresh, attention_mask=mask, **extra)
        token = out.logits[:, -1].float().argmax(-1)
        token = torch.where(done, said[-1], token) if said else token
        said.append(token)
        done = done | torch.isin(token, endings)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        ids = torch.cat([ids, token.unsqueeze(1)], dim=1)
        fresh = ids
        if cached:
            extra["past_key_values"], fresh = out.past_key_values, token.unsqueeze(1)
    return torch.stack(said, dim=1)
