"""Every `method` of a recipe as a real job: its result, its refusals, its end; and early stopping."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs
from tests.launch.ranks import Ranks
from tests.launch.zygote import Point, Start, Zygote
from tests.unit.asking import SIZE, masking, randomised

pytestmark = pytest.mark.launch
METHODS = ("zeroth_order", "first_order", "zero_shot", "in_context", "linear_probe")
SETTINGS = ("first_order.lr=0.01", "in_context.shots=2")
EVERYWHERE = {
    "metric", "final_accuracy", "final_loss", "test_examples", "steps", "stopped_early", "best_step", "forwards",
    "wall_s", "starts", "peak_rss_gib",
}  # fmt: skip
MASKED = ("model.path=masked", 'task.template="{text} is {mask} ."', "task.name=classification")
MASKED += ("task.label_words=[bad, good]",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and models and rows for other tasks than its own."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("methods")
    jobs.make_recipe(folder, training={"steps": 8, "batch_size": 8, "micro_batch_size": 4, "eval_every": 4})
    masking().save_pretrained(folder / "masked")
    config = RobertaConfig(
        **SIZE, vocab_size=len(masking()), intermediate_size=24, max_position_embeddings=40, pad_token_id=0
    )
    randomised(RobertaForMaskedLM(config)).save_pretrained(folder / "masked")
    return folder


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(jobs.environment()) as zygote:
        yield zygote


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def runs(ranks: Ranks, folder: Path) -> dict[str, Path]:
    """A finished run of each method."""
    return {method: ranks.train(folder, method, 1, f"method={method}", *SETTINGS) for method in METHODS}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    found = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return [row for row in found if row["kind"] == kind]


def evaluated(zygote: Zygote, run: Path) -> dict[str, Any]:
    """What `zo_ds eval` prints; in a process of its own, since DeepSpeed begins only once in each."""
    run.with_name("out.txt").unlink(missing_ok=True)
    assert zygote.run(Start(["eval", str(run)], run.parent)) == 0
    found: dict[str, Any] = json.loads(run.with_name("out.txt").read_text())
    return found


def wait_for(there: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.1)


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the lock's and the log's."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "log")))
    return {str(path): path.read_bytes() for path in files}


def test_every_method_gives_the_same_kind_of_result(runs: dict[str, Path], folder: Path) -> None:
    results = {method: jobs.result(run) for method, run in runs.items()}
    for method, result in results.items():
        assert result.keys() >= EVERYWHERE, method
        assert (result["metric"], result["test_examples"], result["stopped_early"]) == ("accuracy", 20, False)
        assert 0 <= result["final_accuracy"] <= 1
        assert result["wall_s"] > 0
        assert result["peak_rss_gib"] > 0.1
        trains = method in ("zeroth_order", "first_order")
        assert result["steps"] == (8 if trains else 0)
        assert ("zero_shot_accuracy" in result) == trains
        # Five forwards or the cost of three for each micro-batch of each step, one for each of the probe's.
        counts = {"zeroth_order": 8 * 2 * 5, "first_order": 8 * 2 * 3, "linear_probe": 64 // 4}
        assert result["forwards"] == counts.get(method, 0)
        last = rows(runs[method], "test")[-1]
        assert (last["accuracy"], last["loss"]) == (result["final_accuracy"], result["final_loss"])
        assert f"method: {method}" in (runs[method] / "resolved.yaml").read_text()
    zero_shot = results["zero_shot"]
    for method in ("zeroth_order", "first_order"):
        assert results[method]["zero_shot_accuracy"] == zero_shot["final_accuracy"]
        assert results[method]["zero_shot_loss"] == zero_shot["final_loss"]
    assert results["in_context"]["final_loss"] != zero_shot["final_loss"]


def test_what_learns_beats_chance(runs: dict[str, Path]) -> None:
    probe, tuned = jobs.result(runs["linear_probe"]), jobs.result(runs["first_order"])
    assert probe["final_accuracy"] > 0.9
    assert probe["final_loss"] < 0.2
    losses = [row["loss"] for row in rows(runs["first_order"], "train")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2
    assert tuned["final_loss"] < tuned["zero_shot_loss"] / 2


def test_the_model_of_a_first_order_run_is_kept(zygote: Zygote, runs: dict[str, Path]) -> None:
    expected, found = jobs.result(runs["first_order"]), evaluated(zygote, runs["first_order"])
    assert found["accuracy"] == expected["final_accuracy"]
    assert found["loss"] == pytest.approx(expected["final_loss"], abs=1e-6)
    assert found["weights_sha256"] == expected["weights_sha256"]


def test_what_needs_a_journal_or_a_model_says_so(runs: dict[str, Path]) -> None:
    for method in ("first_order", "zero_shot"):
        for command in ("replay", "audit"):
            done = jobs.in_process(command, runs[method])
            assert done.code == 3
            assert "no journal" in done.err
    for method in ("zero_shot", "in_context", "linear_probe"):
        done = jobs.in_process("eval", runs[method])
        assert done.code == 3
        assert f"{method}/model" in done.err


@pytest.mark.parametrize("method", ["first_order", "zero_shot", "in_context", "linear_probe"])
def test_two_ranks_give_what_one_gives(method: str, ranks: Ranks, folder: Path, runs: dict[str, Path]) -> None:
    one, two = runs[method], ranks.train(folder, f"{method}-2", 2, f"method={method}", *SETTINGS)
    first, second = jobs.result(one), jobs.result(two)
    numbers = EVERYWHERE - {"wall_s", "peak_rss_gib"}
    assert {key: second[key] for key in numbers} == pytest.approx({key: first[key] for key in numbers}, abs=1e-4)
    losses = [[row["loss"] for row in rows(run, "train")] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_finished(method: str, folder: Path, runs: dict[str, Path]) -> None:
    before = contents(runs[method])
    command = ["train", "recipe.yaml", f"output.run_dir={method}", f"method={method}", *SETTINGS]
    done = jobs.in_process(*command)
    assert done.code == 0, done.err
    assert f"the run in {method} is finished" in done.out
    assert done.out.splitlines()[-1] == method
    done = jobs.in_process(*command, "resume=never")
    assert done.code == 4
    assert "already holds a run" in done.err
    assert contents(runs[method]) == before


@pytest.mark.parametrize(
    ("method", "changes", "difference"),
    [
        ("in_context", ["in_context.shots=1"], "in_context.shots: 2 -> 1"),
        ("first_order", ["training.steps=12"], "training.steps: 8 -> 12"),
        ("first_order", ["first_order.lr=0.1", "resume=fork"], "first_order.lr: 0.01 -> 0.1"),
        ("zero_shot", ["model.path=other"], " -> other"),
        ("zero_shot", ["data.test_examples=3"], "data.test_examples: None -> 3"),
        ("zero_shot", ["task.calibrated=true"], "task.calibrated: False -> True"),
        ("zero_shot", ["method=linear_probe"], "method: zero_shot -> linear_probe"),
        ("linear_probe", ["method=zeroth_order"], "method: linear_probe -> zeroth_order"),
        ("zeroth_order", ["method=zero_shot"], "method: zeroth_order -> zero_shot"),
    ],
)
def test_another_recipe_does_not_replace_a_result(
    method: str, changes: list[str], difference: str, runs: dict[str, Path]
) -> None:
    before = contents(runs[method])
    done = jobs.in_process("train", "recipe.yaml", f"output.run_dir={method}", f"method={method}", *SETTINGS, *changes)
    assert done.code == 2
    assert difference in done.err
    assert "choose another output.run_dir" in done.err
    assert contents(runs[method]) == before


def test_other_examples_do_not_replace_a_result(ranks: Ranks, folder: Path) -> None:
    shutil.copytree(folder / "data", folder / "edited")
    run = ranks.train(folder, "edited-run", 1, "method=zero_shot", "data.path=edited")
    file = folder / "edited" / "train.jsonl"
    file.write_text(file.read_text().replace("the film", "a film", 1))
    before = contents(run)
    done = jobs.in_process("train", "recipe.yaml", "output.run_dir=edited-run", "method=zero_shot", "data.path=edited")
    assert done.code == 2
    assert "data (training examples): " in done.err
    assert contents(run) == before


@pytest.mark.parametrize(
    ("method", "changes", "mention"),
    [
        ("first_order", ["task.objective=accuracy"], "the objective accuracy has no gradient"),
        ("first_order", ["model.dtype=float16"], "float16"),
        ("first_order", ["deepspeed.zero_optimization.stage=3"], "ZeRO stage 3 is refused"),
        ("in_context", [*MASKED], "only a causal LM learns from what stands before"),
        ("in_context", ["task.name=text"], "have no answer to show"),
        ("linear_probe", ["task.name=text"], "the task has 0 classes"),
        ("linear_probe", ["model.head=sequence_classification"], "model.head is sequence_classification"),
    ],
)
def test_what_a_method_cannot_do_is_refused(method: str, changes: list[str], mention: str, folder: Path) -> None:
    before = set(folder.iterdir())
    done = jobs.in_process("train", "recipe.yaml", "output.run_dir=refused", f"method={method}", *changes)
    assert done.code == 2, done.err
    assert mention in done.err
    assert set(folder.iterdir()) == before


def test_batches_are_no_matter_to_what_takes_no_step(ranks: Ranks, folder: Path, runs: dict[str, Path]) -> None:
    odd = ("training.batch_size=3", "training.micro_batch_size=1")
    assert "cannot hold as many examples of each" in jobs.in_process("train", "recipe.yaml", *odd).err
    run = ranks.train(folder, "odd", 1, "method=zero_shot", *odd)
    assert jobs.result(run)["final_loss"] == jobs.result(runs["zero_shot"])["final_loss"]


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe"])
def test_a_masked_model_is_asked_at_its_mask(method: str, ranks: Ranks, folder: Path) -> None:
    run = ranks.train(folder, f"masked-{method}", 1, f"method={method}", *MASKED)
    accuracy = jobs.result(run)["final_accuracy"]
    assert 0.3 <= accuracy <= 0.7 if method == "zero_shot" else accuracy > 0.7


def test_a_killed_first_order_run_starts_anew(ranks: Ranks, folder: Path, runs: dict[str, Path]) -> None:
    """After the fifth step: a model was kept by then, and is not taken for one of the new run."""
    arguments = ("recipe.yaml", "output.run_dir=killed", "method=first_order", *SETTINGS)
    stepped = Point("zo_ds.engine.first_order.FirstOrderEngine.step", after=True)
    ranks.start("killed", folder, 1, *arguments, crash=(0, stepped, 6))
    assert ranks.wait().codes == [-9]
    assert json.loads((folder / "killed" / "model" / "zo_ds.json").read_text())["step"] == 4
    assert not (folder / "killed" / "result.json").exists()
    run = ranks.train(folder, "killed", 1, "method=first_order", *SETTINGS)
    first, second = jobs.result(runs["first_order"]), jobs.result(run)
    timeless = first.keys() - {"wall_s", "peak_rss_gib"}
    assert {key: second[key] for key in timeless} == {key: first[key] for key in timeless}
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 9))
    assert [row["step"] for row in rows(run, "dev")] == [4, 8]
    assert [row["step"] for row in rows(run, "test")] == [0, 8]


def test_a_stopped_first_order_run_does_not_promise_to_go_on(ranks: Ranks, folder: Path) -> None:
    arguments = ("recipe.yaml", "output.run_dir=asked", "method=first_order", "training.steps=100000")
    (rank,) = ranks.start("asked", folder, 1, *arguments)
    wait_for(lambda: rows(folder / "asked", "train"))
    os.kill(rank, signal.SIGTERM)
    ended = ranks.wait()
    assert ended.codes == [75]
    assert "from the last step" not in ended.err[0]
    assert not (folder / "asked" / "result.json").exists()


def test_a_classification_head_is_replayed(ranks: Ranks, folder: Path) -> None:
    """A published task has its label words in the program, not in the recipe."""
    data = folder / "sst2"
    data.mkdir()
    for split in ("train", "dev", "test"):
        lines = [{"sentence": f"the film is {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(16)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("task.name=sst2", "data.path=sst2", "data.splits=files", "model.head=sequence_classification")
    run = ranks.train(folder, "head", 1, *arguments, "training.steps=2")
    assert json.loads(jobs.in_process("replay", run).out)["matches"] is True
    assert json.loads(jobs.in_process("audit", run).out)["problems"] == []


class Stopped:
    """A run that stops early: so large a rate that the first model is the best."""

    arguments = ("training.eval_every=2", "training.steps=40", "zeroth_order.lr=0.4")
    first_order = ("training.eval_every=2", "training.steps=40", "first_order.lr=0.3", "method=first_order")


@pytest.mark.parametrize("arguments", [Stopped.arguments, Stopped.first_order], ids=["zeroth", "first"])
def test_patience_keeps_the_best_model(arguments: tuple[str, ...], ranks: Ranks, zygote: Zygote, folder: Path) -> None:
    name = f"stopped-{arguments[-1].split('=')[-1]}"
    run = ranks.train(folder, name, 1, *arguments, "training.patience=1")
    result = jobs.result(run)
    steps = result["steps"]
    scores = {row["step"]: row["loss"] for row in rows(run, "dev")}
    assert result["stopped_early"] is True
    assert steps < 40
    assert list(scores) == list(range(2, steps + 1, 2))
    # It went on as long as every score was better than all before it.
    assert result["best_step"] == steps - 2 == min(scores, key=scores.__getitem__)
    log = (run / "log.txt").read_text()
    assert f"no better model in 1 evaluations: stopped after {steps} steps" in log
    assert f"back to the best model on the dev set, after step {steps - 2}" in log
    assert json.loads((run / "model" / "zo_ds.json").read_text())["step"] == steps - 2
    found = evaluated(zygote, run)
    assert found["weights_sha256"] == result["weights_sha256"]
    assert found["loss"] == pytest.approx(result["final_loss"], abs=1e-6)
    if "method=first_order" not in arguments:
        replayed = json.loads(jobs.in_process("replay", run).out)
        assert (replayed["steps"], replayed["matches"]) == (steps - 2, True)


def test_a_run_that_stopped_early_goes_on_when_asked(ranks: Ranks, folder: Path) -> None:
    name, arguments = "patient", (*Stopped.arguments, "training.steps=10")
    run = ranks.train(folder, name, 1, *arguments, "training.patience=1")
    first = jobs.result(run)
    steps = first["steps"]
    assert steps < 8
    again = ranks.run(name, folder, 1, "recipe.yaml", f"output.run_dir={name}", *arguments, "training.patience=1")
    assert "is finished" in again.out[0]
    assert jobs.result(run) == first
    # More patience is another end, and none is the end of the recipe.
    ranks.train(folder, name, 1, *arguments, "training.patience=2")
    second = jobs.result(run)
    assert second["steps"] > steps
    ranks.train(folder, name, 1, *arguments)
    third = jobs.result(run)
    assert (third["steps"], third["stopped_early"], jobs.steps_of(run)) == (10, False, 10)
    assert math.isfinite(third["final_loss"])
    whole = jobs.result(ranks.train(folder, "patient-whole", 1, *arguments))
    assert third["weights_sha256"] == whole["weights_sha256"]
    assert third["forwards"] == whole["forwards"] == 10 * 2 * 5
