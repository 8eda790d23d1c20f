"""Whatever the loss function does with the model, the batched evaluator gives what the sequential one gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.families import batch_for, family, fzoo, gap, pair, per_example
from tests.unit.test_forward import Root, check_state, state
from zo_ds.errors import ConfigError
from zo_ds.forward.evaluator import LossFunction
from zo_ds.forward.loss import model_loss

pytestmark = pytest.mark.usefixtures("one_thread")
Inputs = Mapping[str, Tensor]
LLAMA = batch_for("llama")


def inputs(batch: Inputs) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def spread(x: Tensor) -> Tensor:
    return x.double().pow(2).flatten(1).mean(1)


def wrong_tokens(model: nn.Module, batch: Inputs) -> float:
    chosen = model(**inputs(batch)).logits.argmax(-1)
    return float((chosen != batch["labels"]).double().mean()) + 1e-6 * float(chosen.double().mean())


def twice(model: nn.Module, batch: Inputs) -> Tensor:
    return per_example(model, batch) + per_example(model, {**batch, "input_ids": batch["input_ids"].flip(1)})


def twice_the_same(model: nn.Module, batch: Inputs) -> Tensor:
    return per_example(model, batch) * per_example(model, batch)


def depending(model: nn.Module, batch: Inputs) -> Tensor:
    logits = model(**inputs(batch)).logits
    return spread(logits) + spread(model(input_ids=logits.argmax(-1)).logits)


def greedy(model: nn.Module, batch: Inputs) -> Tensor:
    ids = batch["input_ids"]
    for at in (2, 3, 4):
        logits = model(input_ids=ids).logits
        ids = torch.cat([ids[:, :at], logits[:, at - 1 : at].argmax(-1), ids[:, at + 1 :]], 1)
    return spread(logits)


BUFFER = torch.zeros_like(LLAMA["input_ids"])


def greedy_in_place(model: nn.Module, batch: Inputs) -> Tensor:
    BUFFER.copy_(batch["input_ids"])
    for at in (2, 3, 4):
        logits = model(input_ids=BUFFER).logits
        BUFFER[:, at] = logits[:, at - 1].argmax(-1)
    return spread(logits)


def embedded(model: nn.Module, batch: Inputs) -> Tensor:
    vectors = model.get_input_embeddings()(batch["input_ids"])
    return per_example(model, {"inputs_embeds": vectors, "labels": batch["labels"]})


def generated(model: nn.Module, batch: Inputs) -> Tensor:
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    return spread(model.generate(**inputs(batch), output_logits=True, **options).logits[-1])


def reads_weights(model: nn.Module, batch: Inputs) -> Tensor:
    return per_example(model, batch) + 0.1 * sum(p.double().pow(2).sum() for p in model.parameters())


def reads_the_head(model: nn.Module, batch: Inputs) -> Tensor:
    return spread(model.base_model(**inputs(batch)).last_hidden_state @ model.lm_head.weight.T)


def more_calls_for_some_places(model: nn.Module, batch: Inputs) -> Tensor:
    losses = per_example(model, batch)
    flipped = {**batch, "input_ids": batch["input_ids"].flip(1)}
    return losses + per_example(model, flipped) if int(losses.sum() * 1e4) % 2 else losses


def with_options(**options: Any) -> LossFunction:
    return lambda model, batch: per_example(model, {**batch, **options})


def hidden_of_a_block(model: nn.Module, batch: Inputs) -> Tensor:
    return spread(model(**inputs(batch), output_hidden_states=True).hidden_states[1])


VECTORS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
ON_VECTORS = {"inputs_embeds": VECTORS, "labels": LLAMA["labels"]}
SQUARE, POSITIONS = torch.triu(torch.full((1, 1, 6, 6), -1e9), 1), torch.arange(6)[None]
LOSSES: dict[str, LossFunction] = {
    "scalar": model_loss,
    "per example": per_example,
    "accuracy": wrong_tokens,
    "two calls": twice,
    "two equal calls": twice_the_same,
    "the second call depends on the first": depending,
    "greedy decoding": greedy,
    "greedy decoding in a buffer": greedy_in_place,
    "embeds its inputs itself": embedded,
    "generate": generated,
    "reads weights": reads_weights,
    "reads the head": reads_the_head,
    "more calls for some places": more_calls_for_some_places,
    "base model": lambda m, b: spread(m.base_model(**inputs(b)).last_hidden_state),
    "base model, by position": lambda m, b: spread(m.base_model(b["input_ids"])[0]),
    "ids only": lambda m, b: spread(m(b["input_ids"]).logits),
    "with a cache": lambda m, b: spread(m(**inputs(b), use_cache=True).logits),
    "as a tuple": lambda m, b: spread(m(**inputs(b), return_dict=False)[0]),
    "hidden states": hidden_of_a_block,
    "changes the logits": lambda m, b: spread(m(**inputs(b)).logits.mul_(2).sub_(1)),
    "positions for all": with_options(position_ids=POSITIONS),
    "positions first": lambda m, b: per_example(m, {"position_ids": POSITIONS, **b}),
    "square mask": with_options(attention_mask=SQUARE),
    "square mask first": lambda m, b: per_example(m, {"attention_mask": SQUARE, **b}),
    "vectors": lambda m, b: per_example(m, ON_VECTORS),
    "vectors, square mask": lambda m, b: per_example(m, {**ON_VECTORS, "attention_mask": SQUARE}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("replicas", [2, 9])
def test_loss_functions(name: str, replicas: int) -> None:
    found = pair(family("llama"), LOSSES[name], replicas=replicas)
    # Far enough for tokens to change.
    for seed in (7, 8):
        assert gap(found, LLAMA, fzoo(4, 0.1, seed)) < 1e-5


def test_inputs_written_in_place_after_the_first_batch() -> None:
    found = pair(family("llama"), greedy_in_place)
    found.batched._verified = True  # past the check of the first batch
    assert gap(found, LLAMA, fzoo(4, 0.1)) < 1e-5


class Scalar(nn.Module):
    """Its own output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = family("llama")

    def forward(self, batch: Inputs) -> Tensor:
        return self.inner(**batch).loss


def test_module_that_gives_a_scalar() -> None:
    assert gap(pair(Scalar(), lambda m, b: m(b)), LLAMA, fzoo(4)) < 1e-5


def test_one_example_written_in_place() -> None:
    model = Root(lambda m, x: m.l(x.mul_(1.0)), l=nn.Linear(4, 4))
    assert gap(pair(model, lambda m, x: spread(m(x))), torch.ones(1, 4), fzoo(4)) < 1e-5


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failing_loss_function_leaves_everything_usable(at: int, first: bool) -> None:
    calls = [-(10**6)]

    def loss_fn(model: nn.Module, batch: Inputs) -> Tensor:
        losses = per_example(model, batch)
        calls[0] += 1
        if calls[0] == at:
            raise ZeroDivisionError
        return losses

    found = pair(family("gpt2"), loss_fn)
    before = state(found.model)
    if not first:
        found.batched.losses(LLAMA, fzoo(4))
    calls[0] = 0
    with pytest.raises(ZeroDivisionError):
        found.batched.losses(LLAMA, fzoo(4))
    check_state(found.model, before)
    assert gap(found, LLAMA, fzoo(4)) < 1e-5
    check_state(found.model, before)


@pytest.mark.parametrize("error", [IndexError, ConfigError])
def test_a_failing_model_leaves_everything_usable(error: type[Exception]) -> None:
    found = pair(family("opt-350m"))
    before = state(found.model)
    assert gap(found, LLAMA, fzoo(4)) < 1e-5
    bad = {**LLAMA, "input_ids": LLAMA["input_ids"] + 10_000}

    def refuse(*_: Any) -> None:
        raise ConfigError("injected")

    block = next(m for m in found.model.modules() if isinstance(m, nn.ModuleList))[1]
    hook = block.register_forward_hook(refuse) if error is ConfigError else None
    with pytest.raises(error):
        found.batched.losses(LLAMA if hook else bad, fzoo(4))
    if hook:
        hook.remove()
    check_state(found.model, before)
    assert gap(found, LLAMA, fzoo(4)) < 1e-5


def test_call_sees_the_weights_themselves() -> None:
    found = pair(family("llama"))
    with torch.no_grad():
        wanted = family("llama")(**inputs(LLAMA)).logits
    for _ in range(2):
        logits = found.batched.call(lambda m, b: m(**b).logits, inputs(LLAMA))
        assert torch.allclose(logits, wanted, rtol=1e-5, atol=1e-6)
        clean = found.batched.losses(LLAMA, [None, None])
        assert torch.allclose(clean, found.batched.losses(LLAMA, fzoo(2))[:1], rtol=1e-6)


def short_and_long(model: nn.Module, batch: Inputs) -> Tensor:
    """Padded groups: one call for the short examples, another one for the long ones."""
    short = {key: value[:2, :4] for key, value in batch.items()}
    return torch.cat([per_example(model, short), per_example(model, batch)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-125m"])
@pytest.mark.parametrize("size", [{"strict": True}, {"replicas": 2}, {"replicas": 4}, {}], ids=str)
def test_every_call_of_a_loss_is_made_once_for_each_pass(name: str, size: dict[str, Any]) -> None:
    found = pair(family(name), short_and_long, **size)
    places = fzoo(8)
    assert gap(found, batch_for(name), places) < 1e-5
    made: list[int] = []
    layer = next(
        child for child in found.model.modules() if isinstance(child, nn.LayerNorm) or "RMS" in str(type(child))
    )
    hook = layer.register_forward_hook(lambda _, args, __: made.append(args[0].shape[0]))
    found.batched.losses(batch_for(name), places)
    hook.remove()
    at_once = 3 if size.get("strict") else size.get("replicas", len(places))
    assert len(made) == 2 * -(-len(places) // at_once)
    assert sum(made) == len(places) * (2 + 4)
