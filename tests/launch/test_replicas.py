"""Ranks, launchers and offload change nothing: same coefficients, same weights, bit for bit."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.launch import jobs

pytestmark = pytest.mark.launch

OFFLOAD = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, run directory) of 20 steps on one rank with resident weights."""
    folder = tmp_path_factory.mktemp("replicas")
    recipe = jobs.make_recipe(folder)
    done = jobs.deepspeed(folder, 1, recipe, "output.run_dir=reference")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "reference"
    return folder, folder / "reference"


def same(one: Path, other: Path) -> None:
    assert jobs.records(one) == jobs.records(other)
    assert len(jobs.records(one)) == 20
    first, second = jobs.result(one), jobs.result(other)
    timeless = first.keys() - {"wall_s", "peak_rss_gib"}
    assert {key: first[key] for key in timeless} == {key: second[key] for key in timeless}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offload_equals_resident_on_one_and_two_ranks(dtype: str, tmp_path: Path) -> None:
    resident = jobs.make_recipe(tmp_path / "resident", model={"dtype": dtype})
    offload = jobs.make_recipe(tmp_path / "offload", model={"dtype": dtype}, deepspeed=OFFLOAD)
    for ranks in (1, 2):
        for name, recipe in (("resident", resident), ("offload", offload)):
            done = jobs.deepspeed(tmp_path, ranks, recipe, f"output.run_dir={name}{ranks}")
            assert done.code == 0, done.err
    for other in ("resident2", "offload1", "offload2"):
        same(tmp_path / "resident1", tmp_path / other)
    losses = [line for line in (tmp_path / "offload2" / "metrics.jsonl").read_text().splitlines() if "train" in line]
    assert len(losses) == 20


def test_torchrun_equals_deepspeed(reference: tuple[Path, Path]) -> None:
    folder, run_dir = reference
    done = jobs.torchrun(folder, 2, folder / "recipe.yaml", "output.run_dir=torchrun")
    assert done.code == 0, done.err
    same(run_dir, folder / "torchrun")
    assert (folder / "torchrun" / "log-rank1.txt").exists()


def test_same_command_gives_same_weights_without_a_launcher(reference: tuple[Path, Path]) -> None:
    folder, run_dir = reference
    done = jobs.zo_ds(folder, "train", "recipe.yaml", "output.run_dir=plain")
    assert done.code == 0, done.err
    same(run_dir, folder / "plain")


def test_it_learns(reference: tuple[Path, Path]) -> None:
    found = jobs.result(reference[1])
    assert found["final_loss"] < found["zero_shot_loss"] - 0.05


def test_more_ranks_than_work(reference: tuple[Path, Path]) -> None:
    folder, run_dir = reference
    done = jobs.deepspeed(folder, 3, folder / "recipe.yaml", "output.run_dir=three")
    assert done.code == 0, done.err
    same(run_dir, folder / "three")


def test_grid_that_does_not_fit_the_ranks(reference: tuple[Path, Path]) -> None:
    folder, _ = reference
    done = jobs.deepspeed(folder, 2, folder / "recipe.yaml", "output.run_dir=grid", "parallel.population=3")
    assert done.code == 2
    assert "3 ranks cannot share 5 evaluations of the loss" in done.err
    assert not (folder / "grid" / "journal").exists()


def test_ranks_with_different_recipes_do_not_start(reference: tuple[Path, Path]) -> None:
    folder, _ = reference
    port = jobs.free_port()
    lrs = ("0.02", "0.03")
    ranks = [
        jobs.start_rank(folder, rank, 2, port, "recipe.yaml", "output.run_dir=apart", f"zeroth_order.lr={lr}")
        for rank, lr in enumerate(lrs)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 7
        assert "ranks disagree on the recipe, the data or the base weights" in err
        assert "ranks 1 differ from rank 0" in err
    assert not (folder / "apart" / "journal").exists()


def test_a_rank_that_is_killed_ends_the_job(reference: tuple[Path, Path]) -> None:
    folder, _ = reference
    port = jobs.free_port()
    arguments = ("recipe.yaml", "output.run_dir=killed", "training.steps=100000", "training.eval_every=100000")
    first, second = (jobs.start_rank(folder, rank, 2, port, *arguments) for rank in range(2))
    deadline = time.monotonic() + 120
    while jobs.steps_of(folder / "killed") < 5:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.1)
    second.kill()
    _, err = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 7
    assert "another rank is gone" in err
    assert "another rank is gone" in (folder / "killed" / "log.txt").read_text()


def test_port_taken(reference: tuple[Path, Path]) -> None:
    folder, _ = reference
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = jobs.deepspeed(folder, 2, folder / "recipe.yaml", "parallel.timeout_s=20", port=port)
    assert done.code == 4
    assert f"port {port} is taken" in done.err
    assert "--master_port" in done.err
