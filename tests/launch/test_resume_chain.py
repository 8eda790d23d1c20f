"""One run on other numbers of ranks and other stores, killed, changed and forked: always the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.launch import jobs
from tests.launch.zygote import Point, Start, Zygote
from zo_ds.journal.history import read_journal

pytestmark = pytest.mark.launch
Call = Callable[..., jobs.Outcome]
APPENDED = Point("zo_ds.journal.journal.Journal.append", after=True)
TRAINING = {"steps": 5, "batch_size": 16, "micro_batch_size": 4, "eval_every": 1000}
CPU = 'deepspeed={"zero_optimization":{"stage":3,"offload_param":{"device":"cpu"}}}'
NVME = 'deepspeed={"zero_optimization":{"stage":3,"offload_param":{"device":"nvme","nvme_path":"disk"}}}'
RESIDENT = 'deepspeed={"zero_optimization":{"stage":0}}'


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(jobs.environment()) as zygote:
        yield zygote


@pytest.fixture
def zo_ds(zygote: Zygote, tmp_path: Path) -> Call:
    """Runs a command in the test's folder; `crash_after` kills it when so many steps are durable."""

    def call(*arguments: str | Path, crash_after: int | None = None) -> jobs.Outcome:
        texts = [tmp_path / "out.txt", tmp_path / "err.txt"]
        for text in texts:
            text.write_text("")
        crash = None if crash_after is None else (APPENDED, crash_after)
        code = zygote.run(Start([str(argument) for argument in arguments], tmp_path, crash=crash))
        return jobs.Outcome(code, *(text.read_text() for text in texts))

    return call


def train(zo_ds: Call, *arguments: str, **options: Any) -> jobs.Outcome:
    done = zo_ds("train", "recipe.yaml", *arguments, **options)
    assert done.code == (0 if not options else -9), done.err
    return done


def digest(zo_ds: Call, run: str, steps: int | None = None) -> str:
    done = zo_ds("replay", run, *(("--steps", str(steps)) if steps is not None else ()))
    assert done.code == 0, done.err
    return str(json.loads(done.out)["weights_sha256"])


def same(one: Path, other: Path) -> None:
    assert jobs.records(one) == jobs.records(other)
    first, second = jobs.result(one), jobs.result(other)
    timeless = first.keys() - {"wall_s", "peak_rss_gib", "starts"}
    assert {key: first[key] for key in timeless} == {key: second[key] for key in timeless}
    kept, wanted = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert kept.keys() == wanted.keys()
    assert all(kept[name].equal(wanted[name]) for name in kept)


@pytest.mark.parametrize(
    ("strict", "lives"),
    [
        (False, ((5, 1, RESIDENT), (10, 2, RESIDENT), (15, 4, RESIDENT), (20, 1, RESIDENT))),
        (True, ((5, 1, RESIDENT), (10, 2, CPU), (15, 1, NVME), (20, 1, RESIDENT))),
    ],
    ids=["ranks", "strict-stores"],
)
def test_a_run_that_moves_is_the_run_that_stays(
    strict: bool, lives: tuple[tuple[int, int, str], ...], zo_ds: Call, tmp_path: Path
) -> None:
    snapshots = 1e-9 if strict else 1e9
    jobs.make_recipe(
        tmp_path,
        training=TRAINING,
        journal={"snapshot_replay_s": snapshots, "hash_every": 1},
        zeroth_order={"strict": strict, "lr": 5e-3},
    )
    train(zo_ds, "output.run_dir=whole", "training.steps=20")
    for steps, ranks, store in lives:
        arguments = ("output.run_dir=moved", f"training.steps={steps}", store)
        if ranks == 1:
            train(zo_ds, *arguments)
        else:
            done = jobs.deepspeed(tmp_path, ranks, "recipe.yaml", *arguments)
            assert done.code == 0, done.err
        assert len(jobs.records(tmp_path / "moved")) == steps
        assert digest(zo_ds, "moved", steps) == digest(zo_ds, "whole", steps)
        assert jobs.result(tmp_path / "moved")["weights_sha256"] == digest(zo_ds, "moved", steps)
    assert jobs.result(tmp_path / "moved")["starts"] == 4
    assert (tmp_path / "moved" / "snapshots").exists() == strict
    same(tmp_path / "moved", tmp_path / "whole")
    assert zo_ds("audit", "moved").code == 0
    losses = [json.loads(line) for line in (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if row["kind"] == "train"] == list(range(1, 21))


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "runs").iterdir())


def test_the_same_command_takes_up_the_unfinished_run(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training={**TRAINING, "steps": 12, "eval_every": 4})
    train(zo_ds, "output.run_dir=whole")
    train(zo_ds, crash_after=7)
    (first,) = runs(tmp_path)
    assert len(jobs.records(first)) == 7
    done = zo_ds("train", "recipe.yaml", "zeroth_order.lr=0.03", crash_after=2)
    assert "going on with" not in done.out
    assert len(runs(tmp_path)) == 2
    train(zo_ds, "resume=never", crash_after=3)
    assert len(runs(tmp_path)) == 3
    newest = max(runs(tmp_path), key=lambda run: run.stat().st_mtime)
    done = train(zo_ds)
    assert f"going on with the unfinished run {newest.relative_to(tmp_path)}" in done.out
    assert done.out.splitlines()[-1] == str(newest.relative_to(tmp_path))
    same(newest, tmp_path / "whole")
    done = train(zo_ds)
    assert f"going on with the unfinished run {first.relative_to(tmp_path)}" in done.out
    same(first, tmp_path / "whole")
    done = train(zo_ds)
    assert "going on with" not in done.out
    assert len(runs(tmp_path)) == 4


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_other_data_or_templates_need_a_fork(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training=TRAINING)
    train(zo_ds, "output.run_dir=run")
    before = digest(zo_ds, "run")
    more = ("output.run_dir=run", "training.steps=8")
    template = 'task.template="{text} text It was"'
    edit(tmp_path / "data" / "train.jsonl", "the film", "a film")
    for changes, diff in (
        ((), "data (training examples): "),
        ((template,), "task.template: {text} It was -> {text} text It was"),
        (("data.seed=4",), "data.seed: 0 -> 4"),
        (("training.batch_size=8",), "training.batch_size: 16 -> 8"),
        (("zeroth_order.lr=0.5", "zeroth_order.run_seed=1"), "zeroth_order.run_seed: 0 -> 1"),
        (("model.dtype=bfloat16",), "model.dtype: float32 -> bfloat16"),
    ):
        done = zo_ds("train", "recipe.yaml", *more, *changes)
        assert done.code == 2
        assert "this recipe is not that of the run" in done.err
        assert diff in done.err
    assert digest(zo_ds, "run") == before
    done = train(zo_ds, *more, template, "zeroth_order.run_seed=1", "resume=fork")
    assert "forked at step 5" in done.out
    state, result = json.loads((tmp_path / "run" / "state.json").read_text()), jobs.result(tmp_path / "run")
    assert [fork["step"] for fork in state["forks"]] == [5]
    assert len(state["forks"][0]["changes"]) == 3
    assert result["forwards"] == 8 * 5 * 4
    assert [part.header.run_seed for part in read_journal(tmp_path / "run" / "journal").segments] == [0, 1]
    assert digest(zo_ds, "run", result["best_step"]) == result["weights_sha256"]
    assert digest(zo_ds, "run", 5) == before
    assert zo_ds("audit", "run").code == 0
    train(zo_ds, "output.run_dir=run", "training.steps=10", template, "zeroth_order.run_seed=1")
    assert len(jobs.records(tmp_path / "run")) == 10
    assert zo_ds("audit", "run").code == 0


def test_every_rank_ends_with_the_code_of_the_refusal(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training=TRAINING)
    train(zo_ds, "output.run_dir=run")
    edit(tmp_path / "data" / "train.jsonl", "the film", "a film")
    port, arguments = jobs.free_port(), ("recipe.yaml", "output.run_dir=run", "training.steps=8")
    ranks = [jobs.start_rank(tmp_path, rank, 2, port, *arguments) for rank in range(2)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert "data (training examples): " in errors[0]
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_another_base_model_is_refused_whatever_its_folder_is_called(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training=TRAINING)
    train(zo_ds, "output.run_dir=run")
    (tmp_path / "model").rename(tmp_path / "moved")
    train(zo_ds, "output.run_dir=run", "training.steps=6", "model.path=moved")
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    for resume in ("auto", "fork"):
        done = zo_ds(
            "train", "recipe.yaml", "output.run_dir=run", "training.steps=7", "model.path=moved", f"resume={resume}"
        )
        assert done.code == 6
        assert "started from other weights" in done.err


def test_a_fork_that_was_killed_at_its_beginning_can_be_made_again(zygote: Zygote, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training=TRAINING)
    command = ["train", "recipe.yaml", "output.run_dir=run"]
    assert zygote.run(Start(command, tmp_path)) == 0
    fork = [*command, "training.steps=8", "zeroth_order.run_seed=1"]
    begun = (Point("zo_ds.trainer.zeroth_order.open_run"), 1)
    assert zygote.run(Start([*fork, "resume=fork"], tmp_path, crash=begun)) == -9
    assert zygote.run(Start(fork, tmp_path)) == 2
    assert zygote.run(Start([*fork, "resume=fork"], tmp_path)) == 0


def test_a_run_goes_on_without_its_papers(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training={**TRAINING, "steps": 8})
    train(zo_ds, "output.run_dir=whole")
    train(zo_ds, "output.run_dir=run", crash_after=5)
    for name in ("resolved.yaml", "state.json"):
        (tmp_path / "run" / name).unlink()
    train(zo_ds, "output.run_dir=run")
    same(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_state_can_be_removed(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training={**TRAINING, "steps": 8})
    train(zo_ds, "output.run_dir=whole")
    train(zo_ds, "output.run_dir=run", crash_after=5)
    state = tmp_path / "run" / "state.json"
    state.write_text(state.read_text()[:-20])
    done = zo_ds("train", "recipe.yaml", "output.run_dir=run")
    assert done.code == 6
    assert "remove it" in done.err
    state.unlink()
    train(zo_ds, "output.run_dir=run")
    same(tmp_path / "run", tmp_path / "whole")


def test_the_result_of_a_shorter_run_does_not_outlive_its_model(zo_ds: Call, tmp_path: Path) -> None:
    jobs.make_recipe(tmp_path, training={**TRAINING, "steps": 4, "eval_every": 4})
    train(zo_ds, "output.run_dir=run")
    train(zo_ds, "output.run_dir=run", "training.steps=12", crash_after=6)
    kept = json.loads((tmp_path / "run" / "model" / "zo_ds.json").read_text())
    assert kept["step"] == 8
    assert digest(zo_ds, "run") in {kept["weights_sha256"], digest(zo_ds, "run", 10)}
