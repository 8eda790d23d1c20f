"""Schedules: values worked out by hand, bounds for any arguments, and the errors."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_ds.maths.schedules import Schedule, scheduled

CONSTANT, LINEAR, COSINE = Schedule.CONSTANT, Schedule.LINEAR, Schedule.COSINE
ROOT = math.sqrt(2) / 2


@pytest.mark.parametrize(
    ("schedule", "options", "values"),
    [
        (CONSTANT, {}, [8, 8, 8, 8, 8]),
        (CONSTANT, {"warmup_steps": 3, "final_ratio": 0.5}, [2, 4, 6, 8, 8]),
        (LINEAR, {}, [8, 6, 4, 2, 0]),
        (LINEAR, {"final_ratio": 0.5}, [8, 7, 6, 5, 4]),
        (LINEAR, {"warmup_steps": 1}, [4, 8, 16 / 3, 8 / 3, 0]),
        (LINEAR, {"warmup_steps": 2, "final_ratio": 0.25}, [8 / 3, 16 / 3, 8, 5, 2]),
        (COSINE, {}, [8, 4 * (1 + ROOT), 4, 4 * (1 - ROOT), 0]),
        (COSINE, {"final_ratio": 0.5}, [8, 6 + 2 * ROOT, 6, 6 - 2 * ROOT, 4]),
        (COSINE, {"warmup_steps": 2, "final_ratio": 0.25}, [8 / 3, 16 / 3, 8, 5, 2]),
    ],
)
def test_five_steps_by_hand(schedule: Schedule, options: dict[str, float], values: list[float]) -> None:
    found = [scheduled(8.0, schedule, step, 5, **options) for step in range(5)]
    assert found == pytest.approx(values, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_the_decay_ends_on_the_last_step_and_stays_there(schedule: Schedule) -> None:
    for step in (999, 1000, 10**7):
        assert scheduled(3e-4, schedule, step, 1000, warmup_steps=100, final_ratio=0.1) == pytest.approx(3e-5)
        assert scheduled(3e-4, schedule, step, 1000) == 0.0
    assert scheduled(3e-4, schedule, 998, 1000) > 0.0


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_run_of_one_step_moves(schedule: Schedule) -> None:
    assert scheduled(1e-3, schedule, 0, 1) == 1e-3


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warm_up_longer_than_the_run_only_rises(schedule: Schedule) -> None:
    assert [scheduled(10.0, schedule, step, 4, warmup_steps=9) for step in range(4)] == [1.0, 2.0, 3.0, 4.0]


runs = {
    "peak": st.floats(1e-12, 1e3),
    "schedule": st.sampled_from(list(Schedule)),
    "total_steps": st.integers(1, 2000),
    "warmup_steps": st.integers(0, 2500),
    "final_ratio": st.floats(0, 1),
}


@given(st.integers(0, 5000), st.fixed_dictionaries(runs))
def test_values_are_positive_in_warm_up_and_between_final_and_peak_after(step: int, run: dict) -> None:
    value, peak = scheduled(step=step, **run), run["peak"]
    assert value <= peak * (1 + 1e-12)
    if step < run["warmup_steps"]:
        assert value > 0
    elif run["schedule"] is CONSTANT:
        assert value == peak
    else:
        assert value >= peak * run["final_ratio"] * (1 - 1e-12)


@given(st.integers(1, 4000), st.fixed_dictionaries(runs))
def test_it_rises_up_to_the_peak_and_falls_from_there(step: int, run: dict) -> None:
    before, value = scheduled(step=step - 1, **run), scheduled(step=step, **run)
    if step <= run["warmup_steps"]:
        assert value > before
    else:
        assert value <= before * (1 + 1e-12)
    assert scheduled(step=run["warmup_steps"], **run) == pytest.approx(run["peak"])


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0), (3, -5)])
def test_impossible_steps_are_errors(step: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} of {total}"):
        scheduled(1.0, LINEAR, step, total)
