"""What a probe sees: the hidden state before the head, at the last token of a prompt or at its mask."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import on_ranks
from tests.unit.asking import TEMPLATE, classification, labelled, masking, no_gradients, word_tokens
from tests.unit.families import batch_for, family
from zo_ds.data.examples import Example
from zo_ds.errors import ConfigError, ZODSError
from zo_ds.evaluation.features import features
from zo_ds.forward.hidden import hidden_at
from zo_ds.parallel.channel import Channel, SoloChannel
from zo_ds.tasks.calibration import Calibrated
from zo_ds.tasks.masked import LabelWords
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.scorer import Scorer

CAUSAL = ("llama", "opt-125m", "opt-350m", "gpt2", "qwen2", "neox")
MASKED = ("roberta-mlm", "bert-mlm")
CPU = torch.device("cpu")
TEXTS = ["the film is bad", "good", "a dull plot , not very bright", "the cast is great", "slow", "is it good", "quick"]


def backbone(model: nn.Module, **inputs: Tensor) -> Tensor:
    """The last hidden states, by the model's own part below its head."""
    below: Any = getattr(model, str(model.base_model_prefix))
    with torch.no_grad():
        found: Tensor = below(**inputs).last_hidden_state
    return found


def scorer_for(name: str) -> Scorer:
    if name in MASKED:
        task = classification("{text} it is {mask} .", ["bad", "good"])
        return LabelWords(task, masking(), 14)
    return OptionLikelihood(classification(TEMPLATE, ["bad", "good"]), word_tokens(), 14)


def examples_for(scorer: Scorer) -> list[Example]:
    return labelled(scorer._task, TEXTS)


def mask_token(name: str) -> int | None:
    return int(masking().mask_token_id) if name in MASKED else None


def found_by(
    name: str, model: nn.Module, batch_size: int, channel: Channel | None = None, *, lockstep: bool = False
) -> Tensor:
    scorer = scorer_for(name)
    examples, token = examples_for(scorer), mask_token(name)
    channel = channel or SoloChannel()
    call = no_gradients(model)
    return features(call, scorer, examples, batch_size, channel, CPU, mask_token=token, lockstep=lockstep)


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_hidden_states_are_those_before_the_head(name: str) -> None:
    model, batch = family(name), batch_for(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    rows, columns = torch.tensor([3, 0, 1, 0]), torch.tensor([1, 5, 0, 2])
    with torch.no_grad():
        found = hidden_at(model, inputs, rows, columns)
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, backbone(model, **inputs)[rows, columns])
    if name != "opt-350m":  # narrows its hidden states once more before the head
        assert torch.equal(found, states[rows, columns])
    # The head is whole again.
    with torch.no_grad():
        head: Any = model.get_output_embeddings()
        if name in CAUSAL:
            torch.testing.assert_close(head(found), model(**inputs).logits[rows, columns])


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_adapters_are_part_of_the_model(method: str) -> None:
    kinds: dict[str, Any] = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    }
    plain = family("llama")
    model: Any = peft.get_peft_model(copy.deepcopy(plain), kinds[method]).eval()
    batch = batch_for("llama")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    rows, columns = torch.tensor([0, 2]), torch.tensor([5, 1])
    with torch.no_grad():
        found = hidden_at(model, inputs, rows, columns)
        # Soft prompts come before the tokens.
        logits = model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
        torch.testing.assert_close(model.get_base_model().lm_head(found), logits[rows, columns])
        assert not torch.allclose(found, hidden_at(plain, inputs, rows, columns))


def test_a_head_that_cannot_be_told_apart_is_refused() -> None:
    model, batch = family("bert-classes"), batch_for("bert-classes")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(ConfigError, match="cannot be told from the rest"):
        hidden_at(model, inputs, torch.tensor([0]), torch.tensor([0]))


def test_the_hook_does_not_outlive_a_failure() -> None:
    model, batch = family("llama"), batch_for("llama")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(IndexError), torch.no_grad():
        hidden_at(model, inputs, torch.tensor([99]), torch.tensor([0]))
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_every_prompt_has_the_state_it_has_alone(name: str) -> None:
    model, scorer = family(name), scorer_for(name)
    wanted = []
    for example in examples_for(scorer):
        ids = scorer.prompts.encode(example)
        column = ids.index(mask_token(name)) if name in MASKED else len(ids) - 1
        wanted.append(backbone(model, input_ids=torch.tensor([ids]))[0, column])
    for batch_size in (1, 3, 16):
        found = found_by(name, model, batch_size)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert len(torch.stack(wanted).unique(dim=0)) == len(TEXTS)


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("roberta-mlm", 3), ("gpt2", 5)])
@pytest.mark.parametrize("lockstep", [False, True])
def test_ranks_share_the_batches_and_all_have_the_whole(name: str, ranks: int, lockstep: bool) -> None:
    """With five ranks one of them has no batch."""
    alone, calls = found_by(name, family(name), 2), [0] * ranks
    # Hooks belong to a model, and these ranks are threads of one process.
    models = [family(name) for _ in range(ranks)]
    for rank, model in enumerate(models):
        model.register_forward_hook(lambda *_, rank=rank: calls.__setitem__(rank, calls[rank] + 1))

    def work(channel: Channel) -> Tensor:
        return found_by(name, models[channel.rank], 2, channel, lockstep=lockstep)

    for found in on_ranks(ranks, work):
        assert not isinstance(found, ZODSError), found
        assert torch.equal(found, alone)
    assert len(set(calls)) == 1 if lockstep else sum(calls) == 4


def test_a_calibrated_task_is_asked_in_the_same_words() -> None:
    model, scorer = family("llama"), scorer_for("llama")
    examples = examples_for(scorer)
    found = features(no_gradients(model), Calibrated(scorer), examples, 4, SoloChannel(), CPU)
    assert torch.equal(found, found_by("llama", model, 4))


def test_bfloat16_states_come_as_float32() -> None:
    model = family("llama", torch.bfloat16)
    found = found_by("llama", model, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, found_by("llama", family("llama"), 4), rtol=0.1, atol=0.1)
