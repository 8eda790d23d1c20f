"""Rows of one's own: looked at, trained on by every kind of objective, and run with several seeds."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs
from tests.launch.ranks import Ranks
from tests.unit.asking import SIZE, byte_pairs, causal, masking, randomised

pytestmark = pytest.mark.launch
TURNS = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = ("good", "bad", "great", "dull")


def turns(number: int) -> list[dict[str, str]]:
    answer = f"it is {WORDS[number % 2]}"
    return [{"role": "user", "content": f"is film {number} good"}, {"role": "assistant", "content": answer}]


def answers(number: int) -> dict[str, Any]:
    word = WORDS[number % 4]
    return {"context": f"the film is {word}", "question": "is it good?", "answers": {"text": [word, f"it is {word}"]}}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda number: {"text": f"the film is {WORDS[number % 4]} . it is {WORDS[number % 4]}"},
    "completion": lambda number: {"prompt": f"the film number {number} is", "completion": f" {WORDS[number % 2]}"},
    "chat": lambda number: {"messages": turns(number)},
    "squad": lambda number: {"title": "film", **answers(number)},
    "classification": lambda number: {"text": f"the film is {WORDS[number % 2]} text", "label": 1 - number % 2},
}
OWN = ("text", "completion", "chat")
CHOICE = ('task.template="{text} It was"', "task.label_words=[bad, good]")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, one file of forty rows for each task, a model that writes and one that has a mask."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("own")
    jobs.make_recipe(folder, task={"name": "text"}, training={"steps": 20, "eval_every": None})
    tokenizer = copy.deepcopy(byte_pairs())
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder / "writer")
    causal("llama", len(tokenizer), 128).save_pretrained(folder / "writer")
    masking().save_pretrained(folder / "masked")
    size = {**SIZE, "vocab_size": len(masking()), "max_position_embeddings": 40, "pad_token_id": 0}
    randomised(RobertaForMaskedLM(RobertaConfig(**size, intermediate_size=24))).save_pretrained(folder / "masked")
    for task, row in ROWS.items():
        write(folder / f"{task}.jsonl", [row(number) for number in range(40)])
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def own(task: str, *changes: str) -> list[str]:
    return ["model.path=writer", f"task.name={task}", f"data.path={task}.jsonl", *changes]


PREVIEWS = {
    "text": (own("text"), ["'<s>[[the film is good . it is good</s>]]'", "(15 tokens, 14 learned)"]),
    "completion": (own("completion"), ["'<s>the film number 0 is[[ good</s>]]'", "(16 tokens, 2 learned)"]),
    "chat": (own("chat"), ["'[user] is film 0 good\\n[assistant] [[it is good\\n]]'"]),
    "classification": (
        own("classification", *CHOICE),
        ["'<s>the film is good text It was'", "right option: ' good'", "wrong option: ' bad'", "bad 16, good 16"],
    ),
    "masked": (
        own("classification", "model.path=masked", 'task.template="{text} It was {mask}."', CHOICE[1]),
        ["<mask>", "right option: ' good'", "wrong option: ' bad'"],
    ),
    "generated": (
        own("squad", "data.splits=files", "task.max_new_tokens=4"),
        [
            "[[ good\\n]]'",
            "as it is evaluated:",
            "generated: up to 4 tokens, to the end of a line, judged by F1 against ['good', 'it is good']",
        ],
    ),
    "calibrated": (own("classification", *CHOICE, "task.calibrated=true"), ["calibrated by the prompt 'It was'"]),
}


@pytest.mark.parametrize("case", PREVIEWS)
def test_a_preview_shows_what_the_model_gets(case: str) -> None:
    changes, mentions = PREVIEWS[case]
    done = jobs.in_process("data", "preview", "recipe.yaml", *changes)
    assert done.code == 0, done.err
    for mention in ["train: 32 examples\ndev: 4 examples\ntest: 4 examples\n", ".jsonl:1", "median", *mentions]:
        assert mention in done.out
    assert done.out.count("\nexample ") == 2
    assert jobs.in_process("data", "preview", "recipe.yaml", *changes, "--examples", "5").out.count("\nexample ") == 5
    assert not Path("runs").exists()


def test_a_preview_says_what_is_cut() -> None:
    done = jobs.in_process("data", "preview", "recipe.yaml", *own("text", "data.max_length=8"))
    assert "note: 40 of 40 texts are longer than the model's limit and are cut" in done.out
    assert "(8 tokens, 7 learned)" in done.out


BROKEN: dict[str, tuple[str, str, str]] = {
    "no JSON": ("text", '{"text": ', "not JSON"),
    "no object": ("text", '["text"]', "a row is a JSON object"),
    "no text": ("text", '{"texts": "a"}', "the row has no 'text'"),
    "no completion": ("completion", '{"prompt": "a", "completion": " "}', "'completion' is not a text"),
    "no assistant": ("chat", '{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
    "no role": ("chat", '{"messages": [{"from": "human", "value": "a"}]}', "message 1 is not a role and a content"),
    "no such label": ("classification", '{"text": "a", "label": 7}', "the label 7 is not one of the task's"),
    "half a character": ("text", '{"text": "\\ud800"}', "'text' is not a text"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", [["data", "preview"], ["train"]], ids=["preview", "train"])
def test_a_broken_row_is_named(case: str, command: list[str], folder: Path) -> None:
    task, line, mention = BROKEN[case]
    lines = (folder / f"{task}.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*lines[:17], line, *lines[17:]]))
    before = set(folder.iterdir())
    done = jobs.in_process(
        *command, "recipe.yaml", *own(task, *CHOICE * (task == "classification")), "data.path=broken.jsonl"
    )
    assert done.code == 3, done.err
    assert mention in done.err
    assert "broken.jsonl:18" in done.err
    assert set(folder.iterdir()) == before


def test_a_model_without_a_chat_template_is_refused() -> None:
    done = jobs.in_process("data", "preview", "recipe.yaml", "task.name=chat", "data.path=chat.jsonl")
    assert done.code == 2
    assert "no chat template" in done.err


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


@pytest.mark.parametrize("task", OWN)
def test_texts_of_ones_own_are_learned(task: str, ranks: Ranks, folder: Path) -> None:
    result = jobs.result(ranks.train(folder, f"learn-{task}", 1, *own(task)))
    assert (result["metric"], result["test_examples"], result["steps"]) == ("loss", 4, 20)
    assert result["final_loss"] < result["zero_shot_loss"] - 0.3


def test_demonstrations_of_completions(ranks: Ranks, folder: Path) -> None:
    """Each is 15 tokens and its answer; a prompt keeps its end, whatever is before it."""
    arguments = own("completion", "method=in_context", "in_context.shots=4")
    for limit, few in ((128, 0), (60, 4), (20, 4)):
        run = ranks.train(folder, f"icl-{limit}", 1, *arguments, f"data.max_length={limit}")
        log = (run / "log.txt").read_text()
        assert (f"{few} of 4 prompts do not hold all 4 demonstrations" in log) == bool(few)
        assert "are cut" not in log
        assert jobs.result(run)["final_loss"] > 0


def test_a_margin_is_learned(ranks: Ranks, folder: Path) -> None:
    run = ranks.train(folder, "margin", 1, *own("classification", *CHOICE), "task.objective=margin")
    losses = [row["loss"] for row in rows(run, "train")]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert losses[-1] < 0  # no cross-entropy is


SQUAD = own("squad", "data.splits=files", "task.max_new_tokens=4", "task.objective=f1")
ACCURACY = own("classification", *CHOICE, "model.path=model", "task.objective=accuracy")


@pytest.mark.parametrize(("name", "arguments"), [("f1", SQUAD), ("accuracy", ACCURACY)])
def test_objectives_of_few_values(name: str, arguments: list[str], ranks: Ranks, folder: Path) -> None:
    """Losses are shares of the examples; steps in which they tie are skipped, and nothing else happens."""
    settings = ("training.steps=4", "zeroth_order.eps=0.3")
    run = ranks.train(folder, name, 1, *arguments, *settings, "zeroth_order.max_consecutive_skips=100")
    steps = rows(run, "train")
    assert len(steps) == len(jobs.records(run)) == 4
    assert all(0 <= row["loss"] <= 1 for row in steps)
    assert any(row["skip"] is None and row["spread"] > 0 for row in steps)
    assert all(row["spread"] == 0 for row in steps if row["skip"] == "zero_spread")
    if name == "accuracy":
        assert all((8 * row["loss"]).is_integer() for row in steps)
    assert jobs.result(run)["metric"] == name
    assert jobs.in_process("replay", run).code == 0


def test_ties_end_with_advice(ranks: Ranks, folder: Path) -> None:
    settings = ("zeroth_order.eps=1e-7", "output.run_dir=ties", "zeroth_order.max_consecutive_skips=3")
    ended = ranks.run("ties", folder, 1, "recipe.yaml", *ACCURACY, *settings)
    assert ended.codes == [5]
    assert "the last 3 steps were all skipped" in ended.err[0]
    assert "raise eps, use more examples a step" in ended.err[0]
    assert [record["skip"] for record in jobs.records(folder / "ties")] == ["zero_spread"] * 3
    assert not (folder / "ties" / "result.json").exists()


def test_several_seeds(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One of them cannot begin: the other one is not run again when that is mended."""
    short = ("training.steps=2", "model.path=model", "task.name=movie-sentiment", "data.path=data")
    command = ("seeds", "recipe.yaml", *short, "--count", "2", "--out", "many")
    (folder / "many").mkdir()
    (folder / "many" / "seed-1").write_text("in the way")
    done = jobs.in_process(*command)
    assert done.code == 4
    assert "the run with seed 1 ended with exit code 4" in done.err
    assert "many/seed-1" in done.err
    assert not (folder / "many" / "summary.json").exists()
    first = folder / "many" / "seed-0" / "result.json"
    written = first.stat().st_mtime_ns
    (folder / "many" / "seed-1").unlink()
    capfd.readouterr()
    done = jobs.in_process(*command)
    assert done.code == 0, done.err
    printed = capfd.readouterr()
    assert "the run in many/seed-0 is finished" in printed.err
    assert printed.out == ""
    assert first.stat().st_mtime_ns == written
    summary = json.loads((folder / "many" / "summary.json").read_text())
    assert summary == json.loads(done.out)
    results = [jobs.result(folder / "many" / f"seed-{seed}") for seed in range(2)]
    assert (summary["seeds"], summary["recipe"], summary["overrides"]) == (2, "recipe.yaml", list(short))
    for key in ("final_loss", "final_accuracy", "forwards", "wall_s"):
        values = [result[key] for result in results]
        assert summary[key]["values"] == values
        assert summary[key]["mean"] == pytest.approx(sum(values) / 2)
        assert summary[key]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert summary[key]["std"] == pytest.approx(statistics.stdev(values))
    assert results[0]["final_loss"] != results[1]["final_loss"]
    # Another recipe in the same folder is not answered with the results of this one.
    done = jobs.in_process(*command, "zeroth_order.lr=0.5")
    assert done.code == 4
    assert "the run with seed 0 ended with exit code 2" in done.err
    assert "zeroth_order.lr: 0.02 -> 0.5" in capfd.readouterr().err
    assert json.loads((folder / "many" / "summary.json").read_text()) == summary


@pytest.mark.parametrize("override", ["data.seed=3", "zeroth_order.run_seed=1", "peft.seed=1", "output.run_dir=x"])
def test_seeds_are_not_set_by_hand(override: str) -> None:
    done = jobs.in_process("seeds", "recipe.yaml", override)
    assert done.code == 2
    assert f"'{override}' cannot be set here" in done.err
    assert not Path("runs").exists()
