"""AdamW and SGD under DeepSpeed: the same steps as a loop written with transformers and torch.optim alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.conftest import VOCABULARY, tiny_model, zo_batch
from tests.unit.families import batch_for, family
from zo_ds.config.load import validate
from zo_ds.config.schema import ZOConfig
from zo_ds.engine.first_order import FORWARDS_PER_UNIT, FirstOrderEngine
from zo_ds.engine.initialize import initialize
from zo_ds.engine.open_first_order import initialize_first_order
from zo_ds.errors import ConfigError, DataError, NonFiniteError, PeerError, StoppedError
from zo_ds.maths.estimators import SkipReason

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [5, 9]
STEPS = 20


def recipe(first_order: dict[str, Any] | None = None, **sections: Any) -> ZOConfig:
    tree = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "method": "first_order",
        "training": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 8},
        "first_order": {"lr": 1e-3, **(first_order or {})},
        **sections,
    }
    return validate(ZOConfig, tree, where="here")


def open_engine(model: nn.Module, loss_fn: Any = None, first_order: Any = None, **sections: Any) -> FirstOrderEngine:
    return initialize_first_order(model, recipe(first_order, **sections), loss_fn=loss_fn)


def word_batch(step: int, examples: int = 8) -> dict[str, Tensor]:
    """Prompts of one length, and which of two words comes next."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCABULARY, (examples, 6), generator=generator)
    return {"input_ids": ids, "label": torch.randint(0, 2, (examples,), generator=generator)}


def word_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits[:, -1, WORDS]
    return F.cross_entropy(logits.float(), batch["label"], reduction="none")


def rows(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch.items()}


def written_out(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int = STEPS,
    max_norm: float | None = None,
) -> list[float]:
    """The loop everybody writes, in evaluation mode."""
    model.eval()
    losses = []
    for step in range(steps):
        value = loss(model, step)
        losses.append(float(value.detach()))
        value.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def words(model: nn.Module, step: int) -> Tensor:
    """Minus the mean log of the right word's share of both words' probability."""
    batch = word_batch(step)
    odds = model(**{"input_ids": batch["input_ids"]}).logits[:, -1].softmax(-1)[:, WORDS]
    right = odds.gather(1, batch["label"].unsqueeze(1)).squeeze(1)
    return -(right / odds.sum(1)).log().mean()


def own_loss(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = model(**zo_batch(examples=8, seed=step)).loss
    return loss


ADAMW = (
    {"optimizer": "adamw", "betas": (0.8, 0.99), "eps": 1e-6},
    lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.0, fused=False),
)
SGD = (
    {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9},
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=False),
)


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "llama"])
@pytest.mark.parametrize(("settings", "make"), [ADAMW, SGD], ids=["adamw", "sgd"])
def test_label_words_as_in_a_loop_written_out(name: str, settings: dict[str, Any], make: Any) -> None:
    model = family(name)
    reference = copy.deepcopy(model)
    expected = written_out(reference, make(reference.parameters()), words)
    engine = open_engine(model, word_loss, settings)
    found = [engine.step(word_batch(step)).clean_loss for step in range(STEPS)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(abs(value - expected[0]) for value in expected) > 0.01, "nothing was learnt"
    for (key, one), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), key


@pytest.mark.parametrize("name", ["opt-125m", "llama"])
@pytest.mark.parametrize(("settings", "make"), [ADAMW, SGD], ids=["adamw", "sgd"])
def test_the_models_own_loss_as_in_a_loop_written_out(name: str, settings: dict[str, Any], make: Any) -> None:
    model = family(name)
    reference = copy.deepcopy(model)
    expected = written_out(reference, make(reference.parameters()), own_loss)
    engine = open_engine(model, None, settings)
    found = [engine.step(zo_batch(examples=8, seed=step)).clean_loss for step in range(STEPS)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.05


def test_a_clipped_gradient() -> None:
    model = family("llama")
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    expected = written_out(reference, optimizer, words, steps=6, max_norm=0.1)
    settings = {"optimizer": "sgd", "lr": 0.5, "max_grad_norm": 0.1}
    engine = open_engine(model, word_loss, settings)
    assert [engine.step(word_batch(step)).clean_loss for step in range(6)] == pytest.approx(expected, abs=1e-5)
    free = open_engine(family("llama"), word_loss, {**settings, "max_grad_norm": None})
    assert abs([free.step(word_batch(step)).clean_loss for step in range(6)][-1] - expected[-1]) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("settings", [ADAMW[0], SGD[0]], ids=["adamw", "sgd"])
def test_micro_batches_equal_one_batch(settings: dict[str, Any], size: int) -> None:
    whole = open_engine(family("opt-125m"), word_loss, settings)
    training = {"steps": STEPS, "batch_size": 8, "micro_batch_size": size}
    parts = open_engine(family("opt-125m"), word_loss, settings, training=training)
    for step in range(8):
        batch = word_batch(step)
        one, other = whole.step(batch), parts.step([rows(batch, at, at + size) for at in range(0, 8, size)])
        assert other.clean_loss == pytest.approx(one.clean_loss, abs=1e-5)
        assert (one.forwards, other.forwards) == (FORWARDS_PER_UNIT, FORWARDS_PER_UNIT * 8 // size)
    if settings["optimizer"] == "sgd":  # AdamW makes steps of the rounding errors of gradients that are zero
        for one_weight, other_weight in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
            assert torch.allclose(one_weight, other_weight, atol=1e-5)


def test_dropout_is_off_and_the_loss_is_that_of_the_zeroth_order_side() -> None:
    model = family("opt-125m", dropout=0.5, attention_dropout=0.5).train()
    other = initialize(family("opt-125m"), {"zeroth_order": {}}, loss_fn=word_loss)
    engine = open_engine(model, word_loss)
    expected = other.losses(word_batch(0))
    assert torch.equal(engine.losses(word_batch(0)), expected)
    assert engine.step(word_batch(0)).clean_loss == pytest.approx(float(expected.mean()), abs=1e-6)


class Mixed(nn.Module):
    """A matrix and a vector with gradients that are zero, and another of each that never get one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 3), requires_grad=False)
        self.unused, self.unused_vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * ((self.matrix + self.frozen).sum() + self.vector.sum()) + x


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_shrinks_matrices_only_by_the_scheduled_rate(optimizer: str) -> None:
    settings = {"optimizer": optimizer, "lr": 0.1, "weight_decay": 0.5, "momentum": 0.9, "lr_schedule": "linear"}
    settings |= {"warmup_steps": 1, "final_ratio": 0.5}
    model = Mixed()
    training = {"steps": 4, "batch_size": 2, "micro_batch_size": 2}
    engine = open_engine(model, lambda m, x: m(x), settings, training=training)
    rates = [engine.step(torch.ones(2)).lr for _ in range(4)]
    assert rates == pytest.approx([0.05, 0.1, 0.075, 0.05])
    shrunk = 0.975 * 0.95 * 0.9625 * 0.975
    for weight, expected in ((model.matrix, shrunk), (model.vector, 1.0), (model.frozen, 1.0)):
        assert torch.allclose(weight, torch.full_like(weight, expected))
    assert torch.allclose(model.unused, torch.full_like(model.unused, shrunk))
    assert torch.equal(model.unused_vector, torch.ones(3))


def test_decoupled_decay_with_sgd_is_no_part_of_the_momentum() -> None:
    weight, velocity, lr, decay, momentum = 2.0, 0.0, 0.1, 0.3, 0.9
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(weight)
    settings = {"optimizer": "sgd", "lr": lr, "weight_decay": decay, "momentum": momentum}
    engine = open_engine(layer, lambda m, x: m(x).square().mean(1), settings)
    for _ in range(5):
        engine.step(torch.ones(2, 1))
        velocity = momentum * velocity + 2 * weight
        weight = weight * (1 - lr * decay) - lr * velocity
        assert float(layer.weight.detach()) == pytest.approx(weight, rel=1e-5)


def test_adapters_train_and_nothing_else() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), lora)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = open_engine(model, word_loss, {"lr": 0.05})
    losses = [engine.step(word_batch(0)).clean_loss for _ in range(STEPS)]
    assert losses[-1] < losses[0] - 0.05
    after = dict(model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = sum(parameter.nbytes for name, parameter in after.items() if name in changed)
    held = engine.memory
    assert held["gradients"] == trained
    assert 2 * trained <= held["optimizer"] <= 2 * trained + 4 * len(changed)


@pytest.mark.parametrize(("optimizer", "momentum", "states"), [("adamw", 0, 2), ("sgd", 0.9, 1), ("sgd", 0, 0)])
def test_memory_of_weights_gradients_and_optimizer(optimizer: str, momentum: float, states: int) -> None:
    model = family("llama")
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    engine = open_engine(model, word_loss, {"optimizer": optimizer, "momentum": momentum})
    assert engine.memory == {"weights": size, "gradients": 0, "optimizer": 0}
    engine.step(word_batch(0))
    held = engine.memory
    assert (held["weights"], held["gradients"]) == (size, size)
    # AdamW counts the steps of each parameter in a number of its own.
    counters = 4 * len(list(model.parameters())) if optimizer == "adamw" else 0
    assert held["optimizer"] == states * size + counters


def test_a_bfloat16_model_has_fp32_weights_and_bfloat16_products() -> None:
    model = family("llama", torch.bfloat16)
    start = {name: parameter.float() for name, parameter in model.named_parameters()}
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    engine = open_engine(model, word_loss, {"lr": 1e-5})
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    exact = family("llama", torch.bfloat16).float()
    assert engine.losses(word_batch(0)).mean() == pytest.approx(float(words(exact, 0).detach()), abs=0.02)
    engine.step(word_batch(0))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    moved = [parameter for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])]
    assert len(moved) == len(start)
    # Steps this small would be lost in bfloat16.
    lost = [(p.bfloat16() == start[n].bfloat16()).float().mean() for n, p in model.named_parameters() if p.dim() == 2]
    assert min(lost) > 0.8


def test_weights_that_come_from_a_source_are_those_of_the_models_dtype() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4).bfloat16()

    def source(name: str, start: int, flat: Tensor) -> None:
        flat.fill_(1.0 + 2.0**-10)

    engine = initialize_first_order(model, recipe(), loss_fn=lambda m, x: m(x).mean(1), weights=source)
    assert torch.equal(model.weight, torch.ones(4, 4))
    assert torch.equal(model.bias, torch.full((4,), 1.0 + 2.0**-10))
    assert engine.step(torch.ones(8, 4)).skip is None
    assert not torch.equal(model.weight, torch.ones(4, 4))


def scaled(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return word_loss(model, batch) * batch["factor"]


def test_steps_that_are_not_finite_are_skipped_and_end_the_run() -> None:
    engine = open_engine(family("llama"), scaled, {"max_consecutive_skips": 2})
    good, bad = ({**word_batch(0), "factor": factor} for factor in (1.0, float("nan")))
    before = engine.digest()
    out = engine.step(bad)
    assert out.skip is SkipReason.NON_FINITE
    assert out.clean_loss != out.clean_loss
    assert engine.digest() == before
    assert engine.step(good).skip is None
    assert engine.digest() != before
    engine.step(bad)
    with pytest.raises(NonFiniteError, match="last 2 steps"):
        engine.step(bad)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is() -> None:
    layer = nn.Linear(2, 1)
    engine = open_engine(layer, lambda m, x: (m(x) * 0).sqrt().mean(1))
    before = engine.digest()
    out = engine.step(torch.ones(2, 2))
    assert out.clean_loss == 0.0
    assert out.skip is SkipReason.NON_FINITE
    assert engine.digest() == before


def test_what_a_step_reports() -> None:
    engine = open_engine(family("llama"), word_loss)
    out = engine.step([word_batch(0), word_batch(1)])
    assert (out.step, out.skip, out.forwards, out.eps, out.lr) == (0, None, 6, 0.0, 1e-3)
    assert (out.spread, out.coefficients.numel(), out.sent) == (0.0, 0, 0)
    assert out.seconds > 0
    assert engine.steps_done == 1


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    engine = open_engine(tiny_model("llama"), word_loss)
    for step in range(3):
        engine.step(word_batch(step))
    kept = {info.name: p.detach().clone() for p, info in engine.store.parameters.items()}
    digest, losses = engine.digest(), engine.losses(word_batch(9))
    engine.save_pretrained(tmp_path / "model")
    first = engine.step(word_batch(3)).clean_loss
    assert engine.digest() != digest
    engine.load_weights(kept)
    assert engine.digest() == digest
    assert engine.memory["optimizer"] == 0
    assert engine.step(word_batch(3)).clean_loss == first
    there = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.allclose(word_loss(there, word_batch(9)).double(), losses, atol=1e-6)


def test_stopped_as_asked() -> None:
    engine = open_engine(family("llama"), word_loss)
    engine.stop_when(lambda: True)
    with pytest.raises(StoppedError, match="no journal"):
        engine.step(word_batch(0))
    assert engine.steps_done == 1


def test_batches_that_cannot_be_taken() -> None:
    engine = open_engine(family("llama"), word_loss)
    with pytest.raises(DataError, match="at least one micro-batch"):
        engine.step([])
    with pytest.raises(PeerError, match="differ in size"):
        engine.step([word_batch(0, 4), word_batch(0, 2)])


@pytest.mark.parametrize("loss_fn", [lambda m, x: (m(x) > 0).float().mean(1), lambda m, x: m(x), lambda m, x: 1.0])
def test_losses_without_a_gradient_are_refused(loss_fn: Any) -> None:
    engine = open_engine(nn.Linear(2, 2), loss_fn)
    with pytest.raises(ConfigError, match="the loss has no gradient"):
        engine.step(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "ZeRO stage 2 is refused"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO stage 3 is refused"),
        ({"deepspeed": {"zero_optimization": {"stage": 7}}}, "no ZeRO stage 7"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "set first_order.optimizer"),
        ({"deepspeed": {"gradient_clipping": 1.0}}, "set first_order.max_grad_norm"),
        ({"parallel": {"layout": "shard_group"}}, "layout shard_group cannot be used"),
        ({"parallel": {"population": 2}}, "no directions to share out"),
        ({"parallel": {"data": 3}}, "is not 1, the number of ranks"),
        ({"first_order": {"lr": 0}}, "first_order.lr"),
        ({"first_order": {"optimizer": "lion"}}, "first_order.optimizer"),
        ({"method": "third_order"}, "method"),
    ],
)
def test_what_cannot_be_honoured_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        initialize_first_order(nn.Linear(2, 2), recipe(**sections))


def test_a_float16_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16") as caught:
        open_engine(nn.Linear(2, 2).half())
    assert "bfloat16" in caught.value.remedy


def test_actions_at_the_end() -> None:
    engine = open_engine(nn.Linear(2, 2))
    done: list[int] = []
    engine.at_close(lambda: done.append(1))
    engine.close_journal()
    engine.close_journal()
    assert done == [1]


@pytest.mark.parametrize("name", ["roberta-mlm", "bert-classes", "gpt2", "qwen3-moe", "gemma2"])
def test_other_families_learn(name: str) -> None:
    engine = open_engine(family(name), None, {"lr": 5e-3})
    losses = [engine.step(batch_for(name)).clean_loss for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1
