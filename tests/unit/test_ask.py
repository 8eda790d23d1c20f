"""Which way of asking a task gets from which kind of model, and the combinations that are refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

import zo_ds
from tests.unit.asking import TEMPLATE, byte_pairs, masking
from zo_ds.config.schema import TaskConfig
from zo_ds.errors import ConfigError
from zo_ds.forward.rowwise import RowWise
from zo_ds.tasks.ask import Asking, make_asking
from zo_ds.tasks.calibration import Calibrated
from zo_ds.tasks.generation import GenerationJudge, Generator
from zo_ds.tasks.head import Head
from zo_ds.tasks.likelihood import AnswerLikelihood, ChatLikelihood, CompletionLikelihood, TextLikelihood
from zo_ds.tasks.masked import LabelWords
from zo_ds.tasks.options import OptionLikelihood
from zo_ds.tasks.registry import resolve_task
from zo_ds.tasks.reward import find_reward

MODULE = """
import zo_ds

@zo_ds.reward
def brevity(prompt, text, answers):
    return -len(text)

def unmarked(prompt, text, answers):
    return 0.0

class Odd:
    pass

odd = Odd()
"""
OWN: dict[str, Any] = {"template": TEMPLATE, "label_words": ("bad", "good")}
REWARD: dict[str, Any] = {"objective": "reward", "reward": "zo_ds_test_rewards:brevity", "max_new_tokens": 4}


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zo_ds_test_rewards.py").write_text(MODULE)
    (tmp_path / "zo_ds_test_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "zo_ds_test_rewards", raising=False)


def ask(head: str, tokenizer: Any = None, **settings: Any) -> Asking:
    config = TaskConfig(**settings)
    known = tokenizer or (masking() if head == "masked_lm" else byte_pairs())
    return make_asking(resolve_task(config), config, head, known, 64)


def chatting() -> Any:
    found = copy.deepcopy(byte_pairs())
    found.chat_template = "{{ messages[0].content }}"
    return found


@pytest.mark.parametrize(
    ("settings", "learner", "judge", "metric"),
    [
        (OWN, OptionLikelihood, None, "accuracy"),
        ({**OWN, "objective": "margin"}, OptionLikelihood, None, "accuracy"),
        ({**OWN, "objective": "accuracy"}, OptionLikelihood, None, "accuracy"),
        ({**OWN, "objective": "answer"}, AnswerLikelihood, OptionLikelihood, "accuracy"),
        ({**OWN, **REWARD}, Generator, OptionLikelihood, "accuracy"),
        ({**OWN, "calibrated": True}, OptionLikelihood, Calibrated, "accuracy"),
        ({"name": "copa"}, AnswerLikelihood, OptionLikelihood, "accuracy"),
        ({"name": "copa", "objective": "cross_entropy"}, OptionLikelihood, None, "accuracy"),
        ({"name": "record", "calibrated": True}, AnswerLikelihood, Calibrated, "accuracy"),
        ({"name": "squad"}, AnswerLikelihood, GenerationJudge, "f1"),
        ({"name": "drop", "objective": "f1"}, Generator, GenerationJudge, "f1"),
        ({"name": "squad", **REWARD}, Generator, GenerationJudge, "f1"),
        ({"name": "text"}, TextLikelihood, None, "loss"),
        ({"name": "completion"}, CompletionLikelihood, None, "loss"),
        ({"name": "completion", **REWARD}, Generator, GenerationJudge, "reward"),
    ],
)
def test_a_causal_lm(settings: dict[str, Any], learner: type, judge: type | None, metric: str) -> None:
    """A judge of None is the learner itself, so that prompts are encoded once."""
    found = ask("causal_lm", **settings)
    assert type(found.learner) is learner
    assert (found.judge is found.learner) if judge is None else type(found.judge) is judge
    assert found.metric == metric
    assert (type(found.loss_fn) is RowWise) == (learner is Generator)
    if learner is Generator:
        assert found.loss_fn == RowWise(found.learner.loss)


def test_a_conversation() -> None:
    found = ask("causal_lm", chatting(), name="chat")
    assert type(found.learner) is ChatLikelihood
    assert found.judge is found.learner


@pytest.mark.parametrize(("head", "kind"), [("masked_lm", LabelWords), ("sequence_classification", Head)])
@pytest.mark.parametrize("objective", ["cross_entropy", "margin", "accuracy"])
def test_other_models(head: str, kind: type, objective: str) -> None:
    found = ask(head, template="{text} {mask}", label_words=("bad", "good"), objective=objective)
    assert type(found.learner) is kind
    assert found.judge is found.learner
    assert found.metric == "accuracy"


@pytest.mark.parametrize(
    ("head", "settings", "mention"),
    [
        ("causal_lm", {"name": "sst2-masked"}, "asked through a mask, and a causal LM has none"),
        ("causal_lm", {"name": "chat"}, "no chat template"),
        ("causal_lm", {"name": "squad", "calibrated": True}, "the answers of the task 'squad' cannot be calibrated"),
        ("causal_lm", {"name": "text", "calibrated": True}, "the answers of the task 'text' cannot be calibrated"),
        ("masked_lm", OWN, "asked through one mask"),
        ("masked_lm", {"name": "sst2"}, "asked through one mask"),
        ("masked_lm", {"name": "copa"}, "'copa' with objective answer needs a causal LM"),
        ("masked_lm", {"name": "squad"}, "'squad' with objective answer needs a causal LM"),
        ("masked_lm", {"name": "sst2-masked", "objective": "answer"}, "with objective answer needs a causal LM"),
        ("masked_lm", {"name": "movie-sentiment-masked", **REWARD}, "with objective reward needs a causal LM"),
        ("sequence_classification", {"name": "text"}, "'text' with objective answer needs a causal LM"),
        ("sequence_classification", {"name": "record"}, "'record' with objective answer needs a causal LM"),
        ("sequence_classification", {**OWN, "objective": "answer"}, "with objective answer needs a causal LM"),
        ("sequence_classification", {**OWN, **REWARD}, "with objective reward needs a causal LM"),
        ("sequence_classification", {"name": "squad", "objective": "f1"}, "with objective f1 needs a causal LM"),
    ],
)
def test_what_is_refused(head: str, settings: dict[str, Any], mention: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(head, **settings)
    assert mention in caught.value.what
    assert caught.value.remedy


def test_calibrated_scores_are_sums_and_others_means_unless_the_recipe_says_so() -> None:
    def normalised(judge: Any) -> bool:
        return bool(getattr(judge, "_inner", judge)._normalised)

    assert normalised(ask("causal_lm", name="copa").judge)
    assert not normalised(ask("causal_lm", name="copa", length_normalised=False).judge)
    assert not normalised(ask("causal_lm", name="copa", calibrated=True).judge)


# Rewards


def test_a_marked_function_is_found() -> None:
    found = find_reward("zo_ds_test_rewards:brevity")
    assert found("prompt", "four", ()) == -4
    assert zo_ds.reward(found) is found


@pytest.mark.parametrize(
    ("name", "what", "why"),
    [
        ("os:system", "'os:system' is not marked as a reward", "written for it"),
        ("builtins:eval", "not marked as a reward", "written for it"),
        ("zo_ds_test_rewards:unmarked", "not marked as a reward", "written for it"),
        ("zo_ds_test_rewards:odd", "not marked as a reward", "written for it"),
        ("zo_ds_test_rewards:nothing", "there is no reward function", "AttributeError"),
        ("zo_ds_test_rewards", "there is no reward function", "AttributeError"),
        ("zo_ds_test_nowhere:brevity", "there is no reward function", "ModuleNotFoundError"),
        ("zo_ds_test_broken:brevity", "there is no reward function", "ZeroDivisionError"),
        (":brevity", "there is no reward function", "ValueError"),
        ("", "there is no reward function", "ValueError"),
    ],
)
def test_other_functions_are_refused(name: str, what: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_reward(name)
    assert what in caught.value.what
    assert why in caught.value.why
    assert caught.value.where == "task.reward"


def test_a_reward_reaches_learner_and_judge() -> None:
    found = ask("causal_lm", name="completion", **REWARD)
    assert found.learner.columns == found.judge.columns == ("reward", "loss")
