"""Comparing methods: what is planned, chosen, skipped and reported; run directories are written by hand here."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.launch import jobs
from zo_ds.errors import ConfigError, DataError, MachineError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import study_plot  # noqa: E402
import study_report as report  # noqa: E402
from study_plan import Planned, Run, Study, eval_every, plan, read_study  # noqa: E402
from study_runs import Outcome, Point, Runner, choose, forwards_left, known_runs, read_all, record_of  # noqa: E402

FZOO = {"overrides": ["zeroth_order.num_directions=4"], "lr_key": "zeroth_order.lr", "lrs": [0.01, 0.02]}
MEZO = {
    "overrides": ["zeroth_order.estimator=mezo", "zeroth_order.num_directions=1"],
    "lr_key": "zeroth_order.lr",
    "lrs": [1e-4, 2e-4],
}


def write_study(folder: Path, **changes: Any) -> Path:
    """A study of two methods, 20 forwards each: 4 steps of fzoo, 10 of mezo; two evaluations, seeds 3, 5 and 6."""
    recipe = {
        "model": {"path": "no-model"},
        "data": {"path": "no-data"},
        "training": {"steps": 1, "batch_size": 8, "micro_batch_size": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tree = {
        "recipe": "recipe.yaml",
        "budget": 20,
        "evaluations": 2,
        "seeds": [3, 5, 6],
        "accuracies": [0.5, 0.7],
        "losses": [0.6],
        "reference": "mezo",
        "methods": {"fzoo": FZOO, "mezo": MEZO},
        **changes,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def planned(folder: Path, **changes: Any) -> tuple[Study, list[Planned]]:
    file = write_study(folder, **changes)
    study = read_study(file)
    return study, plan(study, file)


def leave(run: Run, work: Path, scores: Sequence[tuple[float, float]], test: float = 0.5, **record: Any) -> None:
    """What a run leaves: dev scores (loss, accuracy) at even distances, the last one at its end, beside other rows."""
    folder = work / run.name
    folder.mkdir(parents=True)
    rows: list[Mapping[str, Any]] = [{"kind": "start", "step": 0}, {"kind": "test", "step": 0, "accuracy": 0.1}]
    every = run.steps // len(scores)
    for number, (loss, accuracy) in enumerate(scores, 1):
        rows.append({"kind": "train", "step": number * every, "loss": 9.0})
        rows.append({"kind": "dev", "step": number * every, "loss": loss, "accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "dev", "st')
    result = {"steps": run.steps, "forwards": run.forwards, "final_accuracy": test, "wall_s": 7.0}
    (folder / "result.json").write_text(json.dumps(result))
    tree = {"recipe_sha256": run.recipe_sha256, "overrides": list(run.overrides), "exit_code": 0, "commit": "abc"}
    record_of(run, work).write_text(json.dumps({**tree, **record}))


def finished(folder: Path) -> tuple[Study, list[Planned], dict[str, Outcome]]:
    """Both methods with all of their runs; fzoo's larger rate diverged."""
    study, (fzoo, mezo) = planned(folder)
    work = folder / "work"
    leave(fzoo.grid[0], work, [(0.7, 0.4), (0.5, 0.8)], 0.75)
    leave(fzoo.grid[1], work, [(0.1, 0.9), (0.1, 0.9)], exit_code=5)
    leave(fzoo.chosen(0.01)[1], work, [(0.9, 0.6), (0.3, 0.7)], 0.65)
    leave(fzoo.chosen(0.01)[2], work, [(0.8, 0.5), (0.4, 0.9)], 0.85)
    leave(mezo.grid[0], work, [(0.9, 0.4), (0.8, 0.5)], 0.45)
    leave(mezo.grid[1], work, [(0.9, 0.4), (0.6, 0.6)], 0.55)
    leave(mezo.chosen(2e-4)[1], work, [(0.9, 0.4), (0.6, 0.6)], 0.5)
    leave(mezo.chosen(2e-4)[2], work, [(0.9, 0.4), (0.6, 0.6)], 0.6)
    return study, [fzoo, mezo], read_all([fzoo, mezo], work)


def test_the_shipped_study_spends_the_same_budget_on_every_method() -> None:
    file = ROOT / "configs" / "studies" / "sentiment.yaml"
    study = read_study(file)
    methods = {found.name: found for found in plan(study, file)}
    assert (methods["fzoo"].steps, methods["fzoo"].forwards_per_step) == (360 // 9, 9)
    assert (methods["mezo"].steps, methods["mezo"].forwards_per_step) == (360 // 2, 2)
    assert (methods["adamw"].steps, methods["adamw"].forwards_per_step) == (360 // 3, 3)
    assert (methods["fzoo-half"].forwards, methods["fzoo-third"].forwards) == (180, 120)
    for name, found in methods.items():
        budget = study.methods[name].budget or study.budget
        assert budget - found.forwards_per_step < found.forwards <= budget
        assert len(found.grid) == len(methods["mezo"].grid)
        every = next(int(o.split("=")[1]) for o in found.grid[0].overrides if o.startswith("training.eval_every="))
        assert abs(every * found.forwards_per_step - budget / study.evaluations) <= found.forwards_per_step


@given(st.integers(1, 500), st.integers(1, 40))
def test_scores_are_spread_over_the_budget(steps: int, evaluations: int) -> None:
    every = eval_every(steps, evaluations)
    scored = {*range(every, steps + 1, every), steps}
    assert len(scored) <= evaluations
    assert every == 1 or len({*range(every - 1, steps + 1, every - 1), steps}) > evaluations, "more would fit"


def test_a_run_takes_the_settings_of_study_method_rate_and_seed(tmp_path: Path) -> None:
    _, (fzoo, _) = planned(tmp_path, overrides=["training.eval_batch_size=32"])
    run = fzoo.make(0.02, 5)
    wanted = {"training.eval_batch_size=32", "zeroth_order.num_directions=4", "zeroth_order.lr=0.02", "data.seed=5"}
    assert wanted | {"zeroth_order.run_seed=5", "training.steps=4", "training.eval_every=2"} <= set(run.overrides)
    assert (run.forwards_per_step, run.forwards) == (5, 20)
    assert [(r.lr, r.seed) for r in fzoo.grid] == [(0.01, 3), (0.02, 3)]
    assert [(r.lr, r.seed) for r in fzoo.chosen(0.02)] == [(0.02, 3), (0.02, 5), (0.02, 6)]


def test_a_batch_of_several_units_takes_as_many_forwards_more(tmp_path: Path) -> None:
    _, (fzoo, mezo) = planned(tmp_path, overrides=["training.batch_size=16"])
    assert (fzoo.forwards_per_step, fzoo.steps) == (10, 2)
    assert (mezo.forwards_per_step, mezo.steps) == (4, 5)


def test_another_recipe_or_setting_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    before = planned(tmp_path / "one")[1][0].grid[0].name
    assert before == planned(tmp_path / "other")[1][0].grid[0].name, "wherever the study lies"
    assert before != planned(tmp_path / "one", overrides=["training.eval_batch_size=4"])[1][0].grid[0].name
    file = write_study(tmp_path / "one")
    (tmp_path / "one" / "recipe.yaml").open("a").write("name: another\n")
    assert before != plan(read_study(file), file)[0].grid[0].name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": 3}, "budgets"),
        ({"methods": {"mezo": {**MEZO, "lr_keys": "x"}}}, "lr_keys"),
        ({"methods": {"mezo": MEZO, "fzoo": {**FZOO, "lrs": [0.1]}}}, "as many different learning rates"),
        ({"methods": {"mezo": MEZO, "fzoo": {**FZOO, "lrs": [0.1, 0.1]}}}, "as many different learning rates"),
        ({"methods": {"mezo": {**MEZO, "lrs": []}}}, "lrs"),
        ({"methods": {"mezo": {**MEZO, "lrs": [1e-3, -1e-3]}}}, "lrs"),
        ({"methods": {"../mezo": MEZO}, "reference": "../mezo"}, "methods"),
        ({"reference": "sgd"}, "reference is 'sgd'"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": []}, "seeds"),
        ({"budget": 4}, "a step of 'fzoo' takes 5 forwards"),
        ({"recipe": "none.yaml"}, "cannot read the configuration"),
        ({"overrides": ["zeroth_order.lrr=1"]}, "lrr"),
        ({"seed_keys": ["data.seeds"]}, "seeds"),
        ({"methods": {"mezo": {**MEZO, "lr_key": "zeroth_order.rate"}}}, "rate"),
        ({"methods": {"mezo": {**MEZO, "overrides": ["method=zero_shot"]}}}, "takes no steps"),
        (
            {"methods": {"mezo": MEZO, "fzoo": {**FZOO, "overrides": ["training.micro_batch_size=4"]}}},
            "not the same work",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, **changes)
    assert words in str(caught.value)


def outcome(run: Run, losses: Sequence[float], *, diverged: bool = False) -> Outcome:
    points = tuple(Point(index, index, loss, 0.5) for index, loss in enumerate(losses))
    return Outcome(run, points, None if diverged else {}, "abc")


def test_the_rate_with_the_least_dev_loss_is_chosen(tmp_path: Path) -> None:
    _, (fzoo,) = planned(tmp_path, methods={"fzoo": {**FZOO, "lrs": [0.04, 0.01, 0.02]}}, reference="fzoo")
    high, low, middle = fzoo.grid
    # What counts is where a run ends, not where it once was.
    assert choose([outcome(high, [0.9, 0.5]), outcome(low, [0.4, 0.8]), outcome(middle, [0.6])]) == 0.04
    assert choose([outcome(high, [0.5]), outcome(low, [0.5]), outcome(middle, [0.6])]) == 0.01, "the smaller of equals"
    assert choose([outcome(high, [0.1], diverged=True), outcome(low, [0.8]), outcome(middle, [0.6])]) == 0.02
    assert choose([outcome(high, [math.nan, math.inf]), outcome(low, [math.nan, 0.8])]) == 0.01
    assert choose([outcome(high, [0.1], diverged=True), outcome(low, [math.nan])]) is None


def test_seeds_follow_when_the_grid_is_done(tmp_path: Path) -> None:
    _, (fzoo, _) = planned(tmp_path)
    done: dict[str, Outcome] = {}
    assert (known_runs(fzoo, done), forwards_left(fzoo, done)) == (fzoo.grid, 4 * 20)
    done[fzoo.grid[0].name] = outcome(fzoo.grid[0], [0.5])
    assert (known_runs(fzoo, done), forwards_left(fzoo, done)) == (fzoo.grid, 3 * 20)
    done[fzoo.grid[1].name] = outcome(fzoo.grid[1], [0.4])
    assert (known_runs(fzoo, done), forwards_left(fzoo, done)) == (fzoo.grid + fzoo.chosen(0.02)[1:], 2 * 20)
    both = {run.name: outcome(run, [0.5], diverged=True) for run in fzoo.grid}
    assert (known_runs(fzoo, both), forwards_left(fzoo, both)) == (fzoo.grid, 0)


def test_only_what_is_finished_and_the_same_is_skipped(tmp_path: Path) -> None:
    _, (fzoo, _) = planned(tmp_path)
    run, work = fzoo.grid[0], tmp_path / "work"
    assert read_all([fzoo], work) == {}
    leave(run, work, [(0.7, 0.4), (0.5, 0.8)])
    found = read_all([fzoo], work)[run.name]
    assert found.points == (Point(2, 10, 0.7, 0.4), Point(4, 20, 0.5, 0.8))
    assert found.final_loss == 0.5
    kept = json.loads(record_of(run, work).read_text())
    for change in ({"overrides": kept["overrides"][:-1]}, {"recipe_sha256": "0"}):
        record_of(run, work).write_text(json.dumps({**kept, **change}))
        assert read_all([fzoo], work) == {}
    record_of(run, work).write_text(json.dumps(kept))
    (work / run.name / "result.json").rename(work / "result.json")
    assert read_all([fzoo], work) == {}
    record_of(run, work).write_text(json.dumps({**kept, "exit_code": 5}))
    assert read_all([fzoo], work)[run.name].final_loss == math.inf


@pytest.mark.parametrize(
    "result",
    ["{", "[]", '{"steps": 3, "forwards": 15}', '{"steps": 4, "forwards": 24}'],
    ids=["cut off", "no object", "shorter", "over the budget"],
)
def test_a_result_that_contradicts_the_plan_is_refused(tmp_path: Path, result: str) -> None:
    _, (fzoo, _) = planned(tmp_path)
    leave(fzoo.grid[0], tmp_path, [(0.7, 0.4), (0.5, 0.8)])
    (tmp_path / fzoo.grid[0].name / "result.json").write_text(result)
    with pytest.raises(DataError, match="takes the run again"):
        read_all([fzoo], tmp_path)


def test_a_run_without_a_score_at_its_end_is_refused(tmp_path: Path) -> None:
    _, (fzoo, _) = planned(tmp_path)
    leave(fzoo.grid[0], tmp_path, [(0.7, 0.4)] * 3)  # after steps 1, 2 and 3 of 4
    with pytest.raises(DataError, match="dev score at the end"):
        read_all([fzoo], tmp_path)


def test_crossings_lie_between_evaluations() -> None:
    at, rising, falling = [10.0, 20.0, 40.0], [0.5, 0.6, 0.8], [0.9, 0.7, 0.3]
    assert report.crossing(at, rising, 0.75, rising=True) == pytest.approx(35)
    assert report.crossing(at, falling, 0.8, rising=False) == pytest.approx(15)
    assert report.crossing(at, rising, 0.6, rising=True) == 20
    assert report.crossing(at, rising, 0.4, rising=True) == 10, "there at the first one"
    assert report.crossing(at, rising, 0.81, rising=True) is None
    assert report.crossing(at, falling, 0.2, rising=False) is None
    assert report.crossing(at, [0.5, 0.7, 0.4], 0.6, rising=True) == pytest.approx(15), "the first of several"
    assert report.crossing(at, [math.nan, 0.7, 0.3], 0.7, rising=False) == 20
    assert report.crossing([], [], 0.7, rising=False) is None


@given(st.floats(0.1, 10), st.lists(st.integers(1, 9), min_size=2, max_size=9), st.floats(0, 1))
def test_a_straight_line_is_crossed_where_it_is(slope: float, gaps: list[int], share: float) -> None:
    at = [float(sum(gaps[: k + 1])) for k in range(len(gaps))]
    where = at[0] + share * (at[-1] - at[0])
    for sign in (1, -1):
        found = report.crossing(at, [sign * slope * x for x in at], sign * slope * where, rising=sign > 0)
        assert found is None or found == pytest.approx(where)
        assert found is not None or share > 1 - 1e-9, "only rounding can miss it, at the very end"


def test_every_score_of_every_run_is_in_the_csv(tmp_path: Path) -> None:
    _, methods, done = finished(tmp_path)
    head, *rows = csv.reader(report.csv_text(methods, done).splitlines())
    assert head == ["method", "lr", "seed", "step", "forwards", "dev_loss", "dev_accuracy", "test_accuracy"]
    assert rows[:2] == [
        ["fzoo", "0.01", "3", "2", "10", "0.7", "0.4", ""],
        ["fzoo", "0.01", "3", "4", "20", "0.5", "0.8", "0.75"],
    ]
    assert len(rows) == 2 * 8
    assert [row[7] for row in rows if row[:2] == ["fzoo", "0.02"]] == ["", ""], "a run that diverged has no test score"
    assert rows[-1] == ["mezo", "0.0002", "6", "10", "20", "0.6", "0.6", "0.6"]


def test_the_summary_holds_what_was_reached_and_when(tmp_path: Path) -> None:
    study, methods, done = finished(tmp_path)
    fzoo, mezo = report.summarise(study, methods, done)
    assert (fzoo.method, fzoo.lr, fzoo.at_edge, fzoo.seeds, fzoo.forwards) == ("fzoo", 0.01, True, (3, 5, 6), 20)
    assert fzoo.test_accuracy.mean == pytest.approx(0.75)
    assert fzoo.test_accuracy.std == pytest.approx(0.1)
    assert fzoo.dev_loss.mean == pytest.approx(0.4)
    assert fzoo.dev_loss.values == (0.5, 0.3, 0.4)
    assert mezo.test_accuracy.std == pytest.approx(statistics.stdev([0.55, 0.5, 0.6]))
    # The mean accuracy goes from 0.5 after 10 forwards to 0.8 after 20, the mean loss from 0.8 to 0.4.
    assert fzoo.to_accuracy == {"0.5": pytest.approx(10), "0.7": pytest.approx(10 + 10 * 2 / 3)}
    assert fzoo.to_loss == {"0.6": pytest.approx(15)}
    assert mezo.to_accuracy == {"0.5": pytest.approx(15), "0.7": None}
    # mezo ends at 0.6 and 0.6 after 20.
    assert fzoo.to_reference == {"accuracy": pytest.approx(10 + 10 / 3), "loss": pytest.approx(15)}
    assert fzoo.ratio == {"accuracy": pytest.approx((10 + 10 / 3) / 20), "loss": pytest.approx(0.75)}
    assert mezo.ratio == {"accuracy": pytest.approx(1), "loss": pytest.approx(1)}


def test_a_seed_that_diverged_is_left_out_and_named(tmp_path: Path) -> None:
    study, methods, done = finished(tmp_path)
    name = methods[0].chosen(0.01)[2].name
    done[name] = Outcome(done[name].run, done[name].points[:1], None, "abc")
    fzoo = report.summarise(study, methods, done)[0]
    assert (fzoo.seeds, fzoo.diverged) == ((3, 5), (6,))
    assert fzoo.test_accuracy.mean == pytest.approx(0.7)
    assert "2 (1 diverged)" in report.tables(study, methods, done)


def test_the_tables_say_all_of_it(tmp_path: Path) -> None:
    study, methods, done = finished(tmp_path)
    text = report.tables(study, methods, done)
    assert "0.7500 ± 0.1000" in text
    assert "0.01 (edge of the grid)" in text
    assert "not reached" in text
    assert "13 (x 0.67)" in text
    assert "<= 10" in text
    assert "diverged" in text
    assert len(re.findall(r"\| chosen +\|", text)) == 2
    for block in text.split("\n\n")[1::2]:
        assert len({len(line) for line in block.splitlines()}) == 1, "columns line up"


def test_the_json_has_the_grid_the_machine_and_the_commits(tmp_path: Path) -> None:
    study, methods, done = finished(tmp_path)
    tree = json.loads(json.dumps(report.tree(study, methods, done, {"commit": "def"})))
    assert (tree["environment"], tree["commits_of_runs"], tree["unfinished"]) == ({"commit": "def"}, ["abc"], [])
    assert [(row["method"], row["lr"], row["outcome"]) for row in tree["grid"]] == [
        ("fzoo", 0.01, "chosen"),
        ("fzoo", 0.02, "diverged"),
        ("mezo", 1e-4, ""),
        ("mezo", 2e-4, "chosen"),
    ]
    assert tree["grid"][1]["final_dev_loss"] is None
    assert tree["methods"][0]["ratio"]["loss"] == pytest.approx(0.75)


def test_without_the_reference_the_others_are_still_reported(tmp_path: Path) -> None:
    study, methods, done = finished(tmp_path)
    part = {name: found for name, found in done.items() if found.run.method == "fzoo"}
    (fzoo,) = report.summarise(study, methods, part)
    assert (fzoo.to_reference, fzoo.ratio) == ({}, {})
    assert "Not finished, or diverged with every learning rate: mezo" in report.tables(study, methods, part)
    assert report.tree(study, methods, part, {})["unfinished"] == ["mezo"]
    assert "Not finished" in report.tables(study, methods, {})


def test_the_plot_is_a_small_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, methods, done = finished(tmp_path)
    outcomes = report.chosen_outcomes(methods[0], done) or []
    curves = {f"method {shift}": [moved(found, shift / 20) for found in outcomes] for shift in range(6)}
    study_plot.draw(curves, tmp_path / "plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1200, 480)
    assert len(data) < 100_000


def moved(found: Outcome, shift: float) -> Outcome:
    points = tuple(Point(p.step, p.forwards, p.loss + shift, p.accuracy - shift) for p in found.points)
    return Outcome(found.run, points, found.result, found.commit)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MachineError, match="pip install matplotlib"):
        study_plot.figure_class()


def test_runs_are_taken_once_and_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in jobs.environment().items():
        monkeypatch.setenv(key, value)
    one = {"fzoo": {**FZOO, "lrs": [0.02]}}
    file = write_study(tmp_path, methods=one, reference="fzoo", seeds=[1])
    recipe = jobs.make_recipe(tmp_path)  # two units a step, so that a step takes 10 forwards
    study = read_study(file)
    methods = plan(study, file)
    lines: list[str] = []
    Runner(methods, tmp_path / "work", 2, lines.append).run()
    assert len(lines) == 1
    assert lines[0].startswith("fzoo lr 0.02 seed 1: dev loss ")
    assert "1/1 runs | 20/20 forwards | 0 running" in lines[0]
    (outcome,) = read_all(methods, tmp_path / "work").values()
    assert [(point.step, point.forwards) for point in outcome.points] == [(1, 10), (2, 20)]
    assert outcome.result is not None
    recipe.unlink()  # a start would fail now
    Runner(methods, tmp_path / "work", 2, lines.append).run()
    assert len(lines) == 1
    with pytest.raises(MachineError, match="ended with exit code 2"):
        Runner(methods, tmp_path / "elsewhere", 2, lines.append).run()
    assert read_all(methods, tmp_path / "elsewhere") == {}
