"""The learning rate that a run began with stays the run's, until the recipe gives a number or the run is forked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import zo_ds
from tests.conftest import on_ranks, tiny_model, weights_of, zo_batch
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.resume import Options, open_run
from zo_ds.errors import ConfigError
from zo_ds.journal.history import read_journal
from zo_ds.journal.records import Header
from zo_ds.journal.replay import replay_
from zo_ds.maths.lr_rule import default_lr
from zo_ds.parallel.channel import Channel, SoloChannel

pytestmark = pytest.mark.usefixtures("one_thread")


def open_engine(
    run_dir: Path | None = None, channel: Channel | None = None, model: Any = None, **options: Any
) -> ZOEngine:
    config = {"zeroth_order": {"num_directions": 4, "run_seed": 3, "lr": "rule", "total_steps": 100, **options}}
    model = model or tiny_model("llama")
    return zo_ds.initialize(model, config, channel=channel or SoloChannel(), run_dir=run_dir)


def units(_: int) -> tuple[list[Any], None]:
    """One batch over and over: random labels teach nothing about others."""
    return [zo_batch()], None


def measured(run: Path, **options: Any) -> ZOEngine:
    """As a script does it: measured before a new run, not before one that goes on."""
    engine = open_engine(**{"lr": "auto", **options})
    if not run.exists():
        engine.measure_lr(units)
    open_run(engine, run, Options(total_steps=engine.config.total_steps))
    return engine


def walk(engine: ZOEngine, last: int) -> list[float]:
    """The learning rates of the steps up to a number."""
    rates = []
    while engine.steps_done < last:
        rates.append(engine.step(zo_batch(seed=engine.steps_done)).lr)
    return rates


def headers(run: Path) -> list[Header]:
    return [segment.header for segment in read_journal(run / "journal").segments]


def killed(engine: ZOEngine, last: int) -> list[float]:
    """Nothing that is done at the end is done, but that the directory's lock is let go, as it is with a process."""
    rates = walk(engine, last)
    while engine._at_close:
        engine._at_close.pop()()
    return rates


def rule(steps: int, **options: Any) -> float:
    config = zo_ds.ZerothOrderConfig(**{"num_directions": 4, **options})
    total = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    return default_lr(config.estimator_spec, total, total, steps)


def test_the_rule_is_written_down_and_stays_when_the_run_gets_longer(tmp_path: Path) -> None:
    engine = open_engine(tmp_path)
    assert walk(engine, 1) == [rule(100)]
    assert killed(engine, 3) == [rule(100)] * 2
    assert [header.lr for header in headers(tmp_path)] == [{"value": rule(100), "how": "rule"}]
    longer = open_engine(tmp_path, total_steps=1000)
    assert longer.steps_done == 3
    assert longer.config.lr == rule(100) != rule(1000)
    assert killed(longer, 5) == [rule(100)] * 2
    again = open_engine(tmp_path, total_steps=10_000)
    assert walk(again, 7) == [rule(100)] * 2
    again.close_journal()
    assert [header.lr for header in headers(tmp_path)] == [{"value": rule(100), "how": "rule"}]
    whole = open_engine(tmp_path / "whole")
    walk(whole, 7)
    assert whole.digest() == again.digest()


def test_what_was_measured_is_measured_once(tmp_path: Path) -> None:
    first = measured(tmp_path / "run")
    found = first.found_lr
    assert found is not None
    assert found["how"] == "range"
    assert len(found["trials"]) >= 2
    assert first.config.lr == found["value"]
    killed(first, 3)
    assert [header.lr for header in headers(tmp_path / "run")] == [found]
    longer = measured(tmp_path / "run", total_steps=900)
    assert longer.found_lr == found
    assert walk(longer, 6) == [found["value"]] * 3
    longer.close_journal()
    whole = measured(tmp_path / "whole")
    assert whole.found_lr == found  # the same run measures the same
    walk(whole, 6)
    assert whole.digest() == longer.digest()
    history = read_journal(tmp_path / "run" / "journal")
    assert replay_(weights_of(open_engine()), history).weights_sha256 == longer.digest()
    assert history.records() == read_journal(tmp_path / "whole" / "journal").records()


def test_a_run_that_stops_before_its_first_step_keeps_it_too(tmp_path: Path) -> None:
    found = measured(tmp_path / "run").found_lr
    again = measured(tmp_path / "run", total_steps=900)
    assert again.steps_done == 0
    assert again.found_lr == found


@pytest.mark.parametrize("lr", [0.01, 1])
def test_a_number_in_the_recipe_counts_from_then_on(lr: float, tmp_path: Path) -> None:
    killed(measured(tmp_path / "run"), 2)
    (begun,) = headers(tmp_path / "run")
    given = measured(tmp_path / "run", lr=lr, coefficient_cap=1.0)
    assert given.found_lr is None
    assert walk(given, 4) == [lr] * 2
    given.close_journal()
    # Taken away again, the run's own comes back.
    back = measured(tmp_path / "run", lr="rule")
    assert back.found_lr == begun.lr
    assert replay_(weights_of(open_engine()), read_journal(tmp_path / "run" / "journal")).weights_sha256 == (
        back.digest()
    )


def test_a_number_that_is_taken_away_gives_the_rule_once(tmp_path: Path) -> None:
    """What it gave is written down then, though the mathematics is the same."""
    killed(open_engine(tmp_path, lr=0.01), 2)
    assert [header.lr for header in headers(tmp_path)] == [None]
    assert killed(open_engine(tmp_path), 4) == [rule(100)] * 2
    assert killed(open_engine(tmp_path, total_steps=5000), 6) == [rule(100)] * 2
    last = open_engine(tmp_path, total_steps=9000)
    assert walk(last, 7) == [rule(100)]
    last.close_journal()
    assert [header.lr for header in headers(tmp_path)] == [None, {"value": rule(100), "how": "rule"}]
    assert replay_(weights_of(open_engine()), read_journal(tmp_path / "journal")).weights_sha256 == last.digest()


@pytest.mark.parametrize("lr", ["rule", "auto"])
def test_a_fork_to_another_estimator_takes_the_rule_for_that(lr: str, tmp_path: Path) -> None:
    killed(measured(tmp_path / "run"), 2)
    (begun,) = headers(tmp_path / "run")
    change = {"estimator": "mezo", "num_directions": 2, "total_steps": 400, "lr": lr}
    fork = open_engine(**change)
    assert open_run(fork, tmp_path / "run", Options(fork=True)).changed
    wanted = rule(400, estimator="mezo", num_directions=2)
    assert walk(fork, 4) == [wanted] * 2
    fork.close_journal()
    assert [header.lr for header in headers(tmp_path / "run")] == [begun.lr, {"value": wanted, "how": "rule"}]
    later = open_engine(tmp_path / "run", **{**change, "total_steps": 4000})
    assert walk(later, 5) == [wanted]
    assert replay_(weights_of(open_engine()), read_journal(tmp_path / "run" / "journal")).weights_sha256 == (
        later.digest()
    )


@pytest.mark.parametrize("change", [{"total_steps": 7}, {"num_directions": 8}, {"eps": 1e-4}, {"lr": 0.3}])
def test_a_fork_of_nothing_takes_what_there_is(change: dict[str, Any], tmp_path: Path) -> None:
    """`fork` allows a change of the mathematics; without one the run goes on as it was."""
    killed(open_engine(tmp_path), 1)
    engine = open_engine(**change)
    changed = open_run(engine, tmp_path, Options(fork=True)).changed
    directions = change.get("num_directions", 4)
    assert bool(changed) == (directions != 4)
    wanted = change.get("lr", rule(100, num_directions=directions))
    assert walk(engine, 2) == [wanted]


def test_a_recorded_run_is_not_measured(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, lr="auto")
    assert engine.found_lr == {"value": rule(100), "how": "rule"}
    with pytest.raises(ConfigError, match="before the journal is opened") as caught:
        engine.measure_lr(units)
    assert "open_run" in (caught.value.remedy or "")
    assert walk(engine, 1) == [rule(100)]


def test_ranks_take_it_from_the_journal_that_one_sees(tmp_path: Path) -> None:
    killed(measured(tmp_path / "run"), 2)
    (begun,) = headers(tmp_path / "run")
    models = [tiny_model("llama") for _ in range(2)]

    def work(channel: Channel) -> tuple[Any, list[float], str]:
        folder = tmp_path / ("run" if channel.rank == 0 else "elsewhere")
        engine = open_engine(channel=channel, model=models[channel.rank], lr="auto", total_steps=5000)
        open_run(engine, folder)
        rates = []
        while engine.steps_done < 4:
            rates.append(engine.step(zo_batch(seed=engine.steps_done)).lr)
        return engine.found_lr, rates, engine.digest()

    found = on_ranks(2, work)
    assert found[0] == found[1]
    assert isinstance(found[0], tuple)
    assert found[0][:2] == (begun.lr, [begun.lr["value"]] * 2 if begun.lr else None)
    assert not os.path.exists(tmp_path / "elsewhere" / "journal")
