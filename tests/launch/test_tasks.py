"""Runs of tasks that are not classification, by one rank, by two, and by two that hold one copy of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import jobs
from tests.launch.ranks import Ranks

pytestmark = pytest.mark.launch

GROUP = ('deepspeed={"zero_optimization":{"stage":3}}', "parallel.layout=shard_group")
SQUAD = ("task.name=squad", "task.max_new_tokens=5", "data.path=questions", "data.splits=files")
HEAD = ("model.head=sequence_classification", "data.path=uneven", "data.group_by_length=false")
TASKS: dict[str, tuple[str, ...]] = {
    "f1": (*SQUAD, "task.objective=f1", "zeroth_order.eps=0.1"),
    "answer": SQUAD,
    "completion": ("task.name=completion", "data.path=completions.jsonl"),
    "head": HEAD,
}


def sentence(number: int, length: int) -> str:
    return " ".join(jobs.WORDS[(number * 7 + k) % len(jobs.WORDS)] for k in range(length))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    jobs.make_recipe(
        folder,
        zeroth_order={"strict": True, "num_directions": 5},
        training={"steps": 2, "eval_every": 2, "batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 5},
        parallel={"threads": 1, "timeout_s": 100, "hang_s": 30},
    )
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(3)
    for name in sorted(weights):
        weights[name] += 0.3 * torch.randn(weights[name].shape, generator=generator)
    # Answers end, but not all at once.
    weights["model.embed_tokens.weight"][2] *= 2.5
    save_file(weights, path, metadata={"format": "pt"})
    for split, count in (("train", 16), ("validation", 5), ("test", 7)):
        rows = [
            {
                "title": "film",
                "context": sentence(n, n % 5 + 1),
                "question": "is it",
                "answers": {"text": [jobs.WORDS[n], "slow", "quick"]},
            }
            for n in range(count)
        ]
        write(folder / "questions" / f"{split}.jsonl", rows)
        # Four short ones and a long one, which alone would take two calls, and then long ones only.
        uneven = [{"text": sentence(n, 27 if n % 3 == 0 else 2), "label": n % 2} for n in range(count)]
        write(folder / "uneven" / f"{split}.jsonl", uneven)
    pairs = [{"prompt": sentence(n, n % 4), "completion": " " + sentence(n + 1, 3)} for n in range(40)]
    write(folder / "completions.jsonl", pairs)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_ranks_and_shard_groups_do_not_matter(task: str, ranks: Ranks, folder: Path) -> None:
    runs = [
        ranks.train(folder, f"{task}-{name}", count, *TASKS[task], *layout)
        for name, count, layout in (("alone", 1, ()), ("two", 2, ()), ("group", 2, GROUP))
    ]
    results = [jobs.result(run) for run in runs]
    timeless = results[0].keys() - {"wall_s", "peak_rss_gib", "starts"}
    losses = [[record["clean_loss"] for record in jobs.records(run)] for run in runs]
    if task == "head":
        # A shard group pads what others compute in two calls; sums are then rounded in another way.
        assert losses[2] == pytest.approx(losses[0], rel=1e-5)
        del runs[2], results[2]
    for run, result in zip(runs[1:], results[1:], strict=True):
        assert jobs.records(run) == jobs.records(runs[0])
        assert {key: result[key] for key in timeless} == {key: results[0][key] for key in timeless}
    metric = {"f1": "f1", "answer": "f1", "completion": "loss", "head": "accuracy"}[task]
    assert results[0]["metric"] == metric
    assert {f"zero_shot_{metric}", f"final_{metric}", "final_loss", "stopped_early", "test_examples"} <= timeless
    state = json.loads((runs[0] / "state.json").read_text())
    assert state["dev"]["2"]["metric"] == state["zero_shot"]["metric"] == metric
    assert [record["skip"] for record in jobs.records(runs[0])] == [None, None]
