"""What a user gets for input that cannot work: a message that says what to do, an exit code, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.launch import jobs
from zo_ds.cli import main

pytestmark = pytest.mark.launch

LINES = [json.dumps({"text": "the film is bad", "label": 0}), json.dumps({"text": "the film is good", "label": 1})]

# How the command ends, what is set on the command line, and what the message mentions.
REFUSED: dict[str, tuple[int, list[str], list[str]]] = {
    "unknown key": (2, ["zeroth_order.learning_rat=1"], ["unknown key 'zeroth_order.learning_rat'"]),
    "misspelt key": (2, ["training.step=3"], ["unknown key 'training.step'; did you mean 'training.steps'?"]),
    "wrong section": (2, ["training.lr=3"], ["unknown key 'training.lr'; did you mean 'zeroth_order.lr'?"]),
    "unknown task": (2, ["task.name=movie-sentimet"], ["unknown task", "did you mean 'movie-sentiment'?"]),
    "few directions": (2, ["zeroth_order.num_directions=3"], ["num_directions is 3", "use 4 or more"]),
    "no radius": (2, ["zeroth_order.eps=0"], ["'zeroth_order.eps'", "greater than 0", "got 0"]),
    "negative rate": (2, ["zeroth_order.lr=-1"], ["'zeroth_order.lr'", "greater than 0", "got -1"]),
    "rate is no number": (2, ["zeroth_order.lr=.nan"], ["'zeroth_order.lr'", "nan"]),
    "no override": (2, ["training.steps"], ["'training.steps' is not an override", "write key=value"]),
    "empty key": (2, ["=3"], ["'=3' is not an override"]),
    "value is no YAML": (2, ["training.steps=[1"], ["the value of 'training.steps' is not valid YAML"]),
    "below a value": (2, ["name.x=1"], ["'name' is a value, not a section"]),
    "micro-batch": (2, ["training.micro_batch_size=3"], ["micro_batch_size 3 does not divide batch_size 8"]),
    "unbalanced batch": (
        2,
        ["training.batch_size=3", "training.micro_batch_size=1"],
        ["training.batch_size", "data.balanced=false"],
    ),
    "stage 2": (2, ["deepspeed.zero_optimization.stage=2"], ["deepspeed.zero_optimization.stage", "gradient"]),
    "bf16 as a value": (2, ["deepspeed.bf16=true"], ["deepspeed.bf16", "block of settings"]),
    "dtype twice": (2, ["deepspeed.bfloat16.enabled=true"], ["deepspeed.bfloat16.enabled", "model.dtype"]),
    "optimizer": (2, ["deepspeed.optimizer.type=Adam"], ["deepspeed.optimizer", "no gradients", "remove it"]),
    "no DeepSpeed file": (2, ["deepspeed=nowhere.json"], ["cannot read the DeepSpeed configuration", "nowhere.json"]),
    "no data": (3, ["data.path=./nowhere"], ["there is no such data folder", "data.path = ./nowhere"]),
    "empty data": (3, ["data.path=empty"], ["the data file is empty", "empty/train.jsonl"]),
    "one class": (3, ["data.path=one"], ["no training example has the label 'great'", "where: one"]),
    "bad row": (3, ["data.path=broken"], ["not JSON", "broken/dev.jsonl:2"]),
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that works, and data sets that do not."""
    folder = tmp_path_factory.mktemp("ready")
    jobs.make_recipe(folder)
    good = "\n".join(LINES)
    for name, train, dev in (("empty", "", good), ("one", LINES[0], good), ("broken", good, LINES[0] + "\n{")):
        (folder / name).mkdir()
        for split, text in (("train", train), ("dev", dev), ("test", good)):
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refuse(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that must leave nothing behind."""
    before = files(folder)
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert files(folder) == before
    return int(caught.value.code or 0), printed.err


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_setting(
    case: str, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, overrides, mentions = REFUSED[case]
    monkeypatch.chdir(ready)
    found, message = refuse(ready, capsys, "train", "recipe.yaml", *overrides)
    assert found == code, message
    assert message.startswith("zo_ds: ")
    for mention in mentions:
        assert mention in message


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["train"], "Missing argument"),
        (["trian", "recipe.yaml"], "No such command 'trian'"),
        (["train", "recipe.yaml", "--fast"], "No such option"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "."], "cannot read the configuration"),
        (["train", "list.yaml"], "a configuration is a mapping"),
        (["train", "torn.yaml"], "torn.yaml:2"),
    ],
)
def test_a_command_line_that_names_no_recipe(
    arguments: list[str], mention: str, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ready)
    (ready / "list.yaml").write_text("- 1\n")
    (ready / "torn.yaml").write_text("a: [1\nb: 2\n")
    code, message = refuse(ready, capsys, *arguments)
    assert code == 2
    assert mention in message


@pytest.mark.parametrize("path", ["./nowhere", "nowhere/at-all"])
def test_a_missing_model(path: str, ready: Path) -> None:
    """Through the real command: the hub is out of reach there."""
    done = jobs.zo_ds(ready, "train", "recipe.yaml", f"model.path={path}")
    assert done.code == 3, done.err
    assert f"model.path = {path}" in done.err
    assert "Traceback" not in done.out + done.err


def test_a_missing_model_leaves_nothing(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ready)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert refuse(ready, capsys, "train", "recipe.yaml", "model.path=./nowhere")[0] == 3


def test_texts_longer_than_the_model(ready: Path, tmp_path: Path) -> None:
    """They are cut and counted, each once, and the run goes on."""
    for split in ("train", "dev", "test"):
        lines = [*LINES, json.dumps({"text": f"{split} film " * 40, "label": 0})]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    short = ["training.steps=2", "training.eval_every=null", "output.save_model=false"]
    done = jobs.zo_ds(ready, "train", "recipe.yaml", f"data.path={tmp_path}", f"output.run_dir={tmp_path}/run", *short)
    assert done.code == 0, done.err
    assert "3 of 9 texts are longer than the model's limit and are cut" in done.out
    assert "step 2/2" in done.out
    assert f"journal {tmp_path}/run/journal" in done.out
    assert f"model {tmp_path}/run/model" not in done.out  # none was asked for


SCRIPT = """
import torch
from transformers import AutoModelForCausalLM
import zo_ds

model = AutoModelForCausalLM.from_pretrained("model")
ids = torch.arange(3, 27).view(4, 6)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
config = {"zeroth_order": {"lr": 0.02, "num_directions": 4}, "train_batch_size": 4}

engine = zo_ds.initialize(model=model, config=config)
losses = [engine.step(batch).clean_loss for _ in range(5)]
engine.save_pretrained("tuned")
print(losses)
"""


def test_three_lines_without_a_launcher(ready: Path) -> None:
    (ready / "three.py").write_text(SCRIPT)
    done = jobs.run([jobs.BIN / "python", "three.py"], ready)
    assert done.code == 0, done.err
    losses = yaml.safe_load(done.out.splitlines()[-1])
    assert len(set(losses)) == 5
    tuned = AutoModelForCausalLM.from_pretrained(ready / "tuned").state_dict()
    base = AutoModelForCausalLM.from_pretrained(ready / "model").state_dict()
    assert tuned.keys() == base.keys()
    assert not torch.equal(tuned["lm_head.weight"], base["lm_head.weight"])
