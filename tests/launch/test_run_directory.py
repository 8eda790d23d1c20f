"""What a run leaves behind, what can be done with it, and who may write to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.launch import jobs
from zo_ds.journal.history import read_journal

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = jobs.make_recipe(folder, output={"tensorboard": True}, zeroth_order={"weight_decay": 0.1})
    done = jobs.zo_ds(folder, "train", recipe, "output.run_dir=run", "zeroth_order.lr=0.03")
    assert done.code == 0, done.err
    return folder


def test_it_explains_itself(finished: Path) -> None:
    run = finished / "run"
    given = (run / "config.yaml").read_text()
    assert given.startswith((finished / "recipe.yaml").read_text())
    assert "# override: zeroth_order.lr=0.03" in given
    assert "lr: 0.03" in (run / "resolved.yaml").read_text()
    assert "auto" not in (run / "ds_config.json").read_text()
    assert json.loads((run / "env.json").read_text())["packages"]["deepspeed"]
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 20
    assert kinds.count("dev") == 3
    assert kinds.count("test") == 2
    assert list((run / "tensorboard").iterdir())
    assert "step 20/20" in (run / "log.txt").read_text()
    assert set(jobs.result(run)) >= {
        "zero_shot_accuracy", "final_accuracy", "test_examples", "steps", "forwards", "wall_s", "peak_rss_gib",
        "weights_sha256",
    }  # fmt: skip
    assert jobs.result(run)["forwards"] == 20 * 5 * 2


def test_resolved_recipe_repeats_the_run(finished: Path) -> None:
    done = jobs.zo_ds(finished, "train", "run/resolved.yaml", "output.run_dir=again")
    assert done.code == 0, done.err
    assert jobs.result(finished / "again")["weights_sha256"] == jobs.result(finished / "run")["weights_sha256"]


def test_eval_gives_the_same_score(finished: Path) -> None:
    done = jobs.zo_ds(finished, "eval", "run")
    assert done.code == 0, done.err
    found, expected = json.loads(done.out), jobs.result(finished / "run")
    assert found["accuracy"] == expected["final_accuracy"]
    assert found["loss"] == expected["final_loss"]
    assert found["weights_sha256"] == expected["weights_sha256"]


def test_transformers_loads_the_model(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "run" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    base = AutoModelForCausalLM.from_pretrained(finished / "model")
    ids = tokenizer("the film is good It was", return_tensors="pt").input_ids
    assert not torch.equal(model(ids).logits, base(ids).logits)


def test_replay_rebuilds_the_weights(finished: Path) -> None:
    done = jobs.zo_ds(finished, "replay", "run", "--save", "replayed")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["matches"] is True
    saved = AutoModelForCausalLM.from_pretrained(finished / "replayed").state_dict()
    kept = AutoModelForCausalLM.from_pretrained(finished / "run" / "model").state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    none = jobs.zo_ds(finished, "replay", "run", "--steps", "0")
    assert none.code == 0
    assert json.loads(none.out)["weights_sha256"] == read_journal(finished / "run" / "journal").header.base_sha256


def test_replay_refuses_what_does_not_belong_together(finished: Path, tmp_path: Path) -> None:
    too_many = jobs.zo_ds(finished, "replay", "run", "--steps", "21")
    assert too_many.code == 2
    assert "20 steps" in too_many.err
    run = tmp_path / "run"
    run.mkdir()
    for name in ("resolved.yaml", "result.json"):
        (run / name).write_text((finished / "run" / name).read_text())
    (run / "journal").mkdir()
    raw = bytearray((finished / "run" / "journal" / "000000.zoj").read_bytes())
    raw[-400] ^= 1
    (run / "journal" / "000000.zoj").write_bytes(raw)
    damaged = jobs.zo_ds(finished, "replay", run)
    assert damaged.code == 6
    assert "000000.zoj: step 13" in damaged.err


def test_a_second_run_does_not_touch_the_first(finished: Path) -> None:
    before = contents(finished / "run")
    for arguments, code, words in (
        ((), 2, "zeroth_order.lr: 0.03 -> 0.02"),
        (("zeroth_order.lr=0.03", "resume=never"), 4, "already holds a run"),
        (("zeroth_order.lr=0.03",), 0, "is finished"),
    ):
        done = jobs.zo_ds(finished, "train", "recipe.yaml", "output.run_dir=run", *arguments)
        assert done.code == code, done.err
        assert words in done.out + done.err
        assert contents(finished / "run") == before


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".owner"
    }


def test_losses_that_stay_non_finite_end_the_run_and_leave_the_weights(tmp_path: Path) -> None:
    recipe = jobs.make_recipe(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = jobs.zo_ds(tmp_path, "train", recipe, "output.run_dir=broken")
    assert done.code == 5
    assert "the last 5 steps were all skipped" in done.err
    assert "non_finite_loss: non-finite in every evaluation, the unperturbed one too" in done.err
    assert done.out.count("SKIPPED: non_finite_loss") == 4
    replayed = jobs.zo_ds(tmp_path, "replay", "broken")
    base = read_journal(tmp_path / "broken" / "journal").header.base_sha256
    assert json.loads(replayed.out) == {"steps": 5, "weights_sha256": base, "matches": None}


def test_directory_in_use_and_kill_in_the_middle(tmp_path: Path) -> None:
    recipe = jobs.make_recipe(tmp_path, training={"steps": 100000, "eval_every": 5})
    command = [str(jobs.BIN / "zo_ds"), "train", str(recipe), "output.run_dir=run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=jobs.environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while jobs.steps_of(tmp_path / "run") < 11:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        second = jobs.run(command, tmp_path)
        assert second.code == 4
        assert "used by another process" in second.err
        assert f"process {process.pid}" in second.err
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = jobs.zo_ds(tmp_path, "replay", "run")
    assert done.code == 0, done.err
    assert json.loads(done.out)["steps"] >= 11


def test_a_model_that_was_damaged_is_rebuilt_and_fewer_steps_are_refused(tmp_path: Path) -> None:
    recipe = jobs.make_recipe(tmp_path, zeroth_order={"lr": 0.05})
    whole = jobs.zo_ds(tmp_path, "train", recipe, "output.run_dir=run", "training.steps=8")
    assert whole.code == 0, whole.err
    fewer = jobs.zo_ds(tmp_path, "train", recipe, "output.run_dir=run", "training.steps=4", "journal.hash_every=5")
    assert fewer.code == 0, "a finished run of more steps is finished"
    (tmp_path / "run" / "result.json").unlink()
    fewer = jobs.zo_ds(tmp_path, "train", recipe, "output.run_dir=run", "training.steps=4")
    assert fewer.code == 2
    assert "the run has 8 steps already" in fewer.err
    model = tmp_path / "run" / "model" / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-9] ^= 1
    model.write_bytes(raw)
    again = jobs.zo_ds(tmp_path, "train", recipe, "output.run_dir=run", "training.steps=8")
    assert again.code == 0, again.err
    kept = json.loads((tmp_path / "run" / "model" / "zo_ds.json").read_text())
    assert kept["weights_sha256"] == jobs.result(tmp_path / "run")["weights_sha256"]
    assert jobs.zo_ds(tmp_path, "replay", "run").code == 0
    found = json.loads(jobs.zo_ds(tmp_path, "eval", "run").out)
    assert found["weights_sha256"] == kept["weights_sha256"]
