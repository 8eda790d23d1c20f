"""`zeroth_order.lr: auto` in real jobs: measured once, before the first step, the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs
from tests.launch.ranks import Ranks
from tests.launch.zygote import Point
from zo_ds.journal.history import read_journal

pytestmark = pytest.mark.launch

AUTO = "zeroth_order.lr=auto"
STEPS = 40
"""Of 9 evaluations, so that 18 are affordable: 9 for the estimate, 1 at theta, 7 trials."""
SHARDED = 'deepspeed={"zero_optimization":{"stage":3}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    jobs.make_recipe(
        folder,
        zeroth_order={"lr": "rule", "num_directions": 8, "strict": True},
        training={"steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "eval_every": STEPS},
    )
    return folder


@pytest.fixture(scope="module")
def alone(ranks: Ranks, folder: Path) -> Path:
    """One rank that nothing happens to."""
    return ranks.train(folder, "alone", 1, AUTO)


def rate(run: Path) -> dict[str, Any]:
    (header,) = [segment.header for segment in read_journal(run / "journal").segments]
    assert header.lr is not None
    return dict(header.lr)


def shown(run: Path) -> set[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["lr"] for row in rows if row["kind"] == "train"}


def test_it_says_what_it_tried_and_learns(alone: Path) -> None:
    found, log = rate(alone), (alone / "log.txt").read_text()
    assert found["how"] == "range"
    assert found["forwards"] == 9 + 1 + len(found["trials"]) <= 0.05 * STEPS * 9
    assert 2 <= len(found["trials"]) <= 7
    assert f"range test, {found['forwards']} forwards: loss {found['loss_before']:.4f} before" in log
    for lr, loss in found["trials"]:
        assert f"{lr:.3g} {loss:.4f}" in log
    assert f"learning rate {found['value']:.3g}, by range" in log
    assert shown(alone) == {found["value"]}
    assert found["value"] == pytest.approx(found["best_single_step"] * 1.6 / STEPS**0.5)
    result = jobs.result(alone)
    assert result["steps"] == STEPS
    assert result["final_loss"] < result["zero_shot_loss"]


def test_a_finished_run_is_finished_and_goes_on_with_the_same_rate(ranks: Ranks, folder: Path, alone: Path) -> None:
    done = ranks.run("again", folder, 1, "recipe.yaml", "output.run_dir=alone", AUTO)
    assert done.codes == [0]
    assert "is finished" in done.out[0] + done.err[0]
    found, records = rate(alone), jobs.records(alone)
    longer = ranks.train(folder, "alone", 1, AUTO, f"training.steps={STEPS + 4}")
    assert rate(longer) == found
    assert shown(longer) == {found["value"]}
    assert jobs.records(longer)[:STEPS] == records
    assert len(jobs.records(longer)) == STEPS + 4
    replayed = jobs.zo_ds(folder, "replay", "alone")
    assert json.loads(replayed.out)["weights_sha256"] == jobs.result(longer)["weights_sha256"]


@pytest.mark.parametrize("point", ["zo_ds.engine.lr_range._search", "zo_ds.engine.engine.ZOEngine._agree"])
def test_a_kill_while_or_after_it_measures_changes_nothing(point: str, ranks: Ranks, folder: Path, alone: Path) -> None:
    name = point.rpartition(".")[2]
    ranks.start(name, folder, 1, "recipe.yaml", f"output.run_dir={name}", AUTO, crash=(0, Point(point), 1))
    assert ranks.wait().codes == [-9]
    run = ranks.train(folder, name, 1, AUTO)
    assert rate(run) == rate(alone)
    assert jobs.records(run) == jobs.records(alone)[:STEPS]


@pytest.mark.parametrize(
    "arguments",
    [
        ("parallel.population=1",),
        ("parallel.population=2",),
        ("parallel.population=2", SHARDED, "parallel.layout=shard_group"),
        ("parallel.population=1", SHARDED, "parallel.layout=shard_group"),
    ],
    ids=["data", "directions", "shards-directions", "shards-data"],
)
def test_ranks_measure_what_one_does(arguments: tuple[str, ...], ranks: Ranks, folder: Path, alone: Path) -> None:
    """A trial is one evaluation: with the directions shared out, one rank has none of its own."""
    name = f"two-{'-'.join(str(len(argument)) for argument in arguments)}-{arguments[0][-1]}"
    run = ranks.train(folder, name, 2, AUTO, "training.eval_every=20", *arguments)
    assert rate(run) == rate(alone)
    assert jobs.records(run) == jobs.records(alone)[:STEPS]


def test_a_short_run_takes_the_rule(ranks: Ranks, folder: Path) -> None:
    run = ranks.train(folder, "short", 1, AUTO, "training.steps=6")
    by_rule = ranks.train(folder, "rule", 1, "training.steps=6")
    assert "6 steps are too few for a range test" in (run / "log.txt").read_text()
    assert rate(run) == rate(by_rule)
    assert rate(run)["how"] == "rule"
    assert jobs.records(run) == jobs.records(by_rule)


def test_no_rate_that_helps_is_an_error_in_one_message(ranks: Ranks, folder: Path) -> None:
    """A loss of right or wrong answers does not change within so small a radius."""
    ended = ranks.run(
        "none",
        folder,
        1,
        "recipe.yaml",
        "output.run_dir=none",
        AUTO,
        "task.objective=accuracy",
        "zeroth_order.eps=1e-9",
    )
    assert ended.codes == [2]
    assert "the range test found no learning rate" in ended.err[0]
    assert "set zeroth_order.lr to a number or to rule" in ended.err[0]
    assert "Traceback" not in ended.err[0]
