"""Adapters in real jobs: killed and resumed, in every layout, on every family; and what is done with them later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.launch import jobs
from tests.launch.ranks import Ranks
from tests.launch.zygote import Point
from tests.unit.families import family
from zo_ds.journal.history import read_journal

pytestmark = pytest.mark.launch
APPENDED = Point("zo_ds.journal.journal.Journal.append", after=True)
SETTINGS = {"lora": ("peft.r=4",), "prefix": ("peft.virtual_tokens=3", "zeroth_order.eps=0.1")}
CPU = 'deepspeed={"zero_optimization":{"stage":3,"offload_param":{"device":"cpu"}}}'
NVME = 'deepspeed={"zero_optimization":{"stage":3,"offload_param":{"device":"nvme","nvme_path":"disk"}}}'
ZERO3 = 'deepspeed={"zero_optimization":{"stage":3}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    jobs.make_recipe(
        folder,
        zeroth_order={"lr": 0.02, "num_directions": 4, "strict": True},
        training={"steps": 12, "batch_size": 8, "micro_batch_size": 2, "eval_every": 4},
        journal={"snapshot_replay_s": 1e-9, "hash_every": 2, "audit_every": 3},
    )
    (folder / "disk").mkdir()
    return folder


def options(method: str) -> tuple[str, ...]:
    return (f"peft.method={method}", *SETTINGS[method])


def outcome(run: Path) -> dict[str, Any]:
    found = jobs.result(run)
    return {key: found[key] for key in found.keys() - {"wall_s", "peak_rss_gib", "starts"}}


@pytest.fixture(scope="module", params=list(SETTINGS))
def runs(request: pytest.FixtureRequest, ranks: Ranks, folder: Path) -> tuple[str, Path, Path]:
    """A method, a run of it, and one that was killed twice: as one process, and as the launcher's two ranks."""
    method: str = request.param
    whole, killed = ranks.train(folder, f"{method}-whole", 1, *options(method)), f"{method}-killed"
    for rank, steps in ((0, 5), (1, 3)):
        count, number = (1, steps) if rank == 0 else (2, steps)
        point = APPENDED if rank == 0 else Point("zo_ds.engine.engine.ZOEngine._agree")
        ranks.start(
            killed, folder, count, "recipe.yaml", f"output.run_dir={killed}", *options(method),
            crash=(rank, point, number),
        )  # fmt: skip
        assert -9 in ranks.wait().codes
    assert 5 <= jobs.steps_of(folder / killed) < 12
    done = jobs.deepspeed(folder, 2, "recipe.yaml", f"output.run_dir={killed}", *options(method))
    assert done.code == 0, done.err
    return method, whole, folder / killed


def test_a_killed_run_ends_where_it_would_have(runs: tuple[str, Path, Path]) -> None:
    method, whole, killed = runs
    assert jobs.records(whole) == jobs.records(killed)
    assert outcome(whole) == outcome(killed)
    one, other = (load_file(run / "model" / "adapter_model.safetensors") for run in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {info.name for info in read_journal(whole / "journal").header.parameters} == one.keys()
    for snapshot in (whole / "snapshots").glob("step-*"):
        assert load_file(snapshot / "model.safetensors").keys() == one.keys()
    assert (whole / "start").is_dir() == (method == "prefix")


def test_what_is_done_with_it_afterwards(runs: tuple[str, Path, Path], folder: Path) -> None:
    method, whole, killed = runs
    found = {command: jobs.zo_ds(folder, command, killed) for command in ("eval", "replay", "audit")}
    assert [done.code for done in found.values()] == [0, 0, 0], [done.err for done in found.values()]
    scores, expected = json.loads(found["eval"].out), jobs.result(whole)
    assert scores["loss"] == expected["final_loss"]
    assert scores["weights_sha256"] == json.loads(found["replay"].out)["weights_sha256"] == expected["weights_sha256"]
    assert json.loads(found["replay"].out)["matches"] is True
    file, applied = folder / f"{method}.zoj", folder / f"{method}-applied"
    assert jobs.zo_ds(folder, "export", killed, "--as", "journal", file).code == 0
    done = jobs.zo_ds(folder, "apply", file, "--save", applied)
    assert done.code == 0, done.err
    raw = [(place / "adapter_model.safetensors").read_bytes() for place in (applied, whole / "model")]
    assert raw[0] == raw[1]


def test_peft_loads_the_adapter(runs: tuple[str, Path, Path], folder: Path) -> None:
    _, whole, _ = runs
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    given = tokenizer("the film is good It was", return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        plain = base(**given).logits
        adapted = peft.PeftModel.from_pretrained(base, whole / "model").eval()(**given).logits
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(whole / "model").eval()(**given).logits
    assert torch.equal(adapted, auto)
    assert not torch.allclose(adapted, plain)


def test_going_on_from_an_adapter(runs: tuple[str, Path, Path], folder: Path, ranks: Ranks) -> None:
    method, whole, _ = runs
    start = f"peft.path={whole / 'model'}"
    more = ranks.train(folder, f"{method}-more", 1, *options(method), start, "training.steps=2")
    assert outcome(more)["zero_shot_loss"] == outcome(whole)["final_loss"]
    assert not (more / "start").exists()


def test_a_best_model_that_is_lost_is_found_again(runs: tuple[str, Path, Path], folder: Path, ranks: Ranks) -> None:
    method, whole, _ = runs
    lost = folder / f"{method}-lost"
    shutil.copytree(whole, lost)
    shutil.rmtree(lost / "model")
    (lost / "result.json").unlink()
    state = json.loads((lost / "state.json").read_text())
    # Another step than the last is the best: the weights must come from the journal.
    for step, scores in state["dev"].items():
        scores["values"]["loss"] = 0.1 if int(step) == 8 else 5.0
    (lost / "state.json").write_text(json.dumps(state))
    ranks.train(folder, lost.name, 2, *options(method))
    replayed = jobs.zo_ds(folder, "replay", whole, "--steps", "8")
    assert jobs.result(lost)["weights_sha256"] == json.loads(replayed.out)["weights_sha256"]


@pytest.mark.parametrize(
    ("layout", "store"),
    [("solo", CPU), ("shard_group", ZERO3), ("shared_host", NVME)],
)
def test_layouts(runs: tuple[str, Path, Path], folder: Path, ranks: Ranks, layout: str, store: str) -> None:
    method, whole, _ = runs
    run = ranks.train(folder, f"{method}-{layout}", 2, *options(method), f"parallel.layout={layout}", store)
    assert jobs.records(run) == jobs.records(whole)
    assert outcome(run) == outcome(whole)


# Every family

FAMILIES = {
    "opt": ("opt-125m", {"max_position_embeddings": 48}),
    "llama": ("llama", {"max_position_embeddings": 48}),
    "phi": ("phi", {"max_position_embeddings": 48}),
    "roberta": ("roberta-mlm", {"max_position_embeddings": 48}),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and a model of each family."""
    folder = tmp_path_factory.mktemp("families")
    jobs.make_recipe(
        folder,
        zeroth_order={"num_directions": 4, "eps": 1e-2},
        training={"steps": 20, "batch_size": 4, "micro_batch_size": 4},
        data={"dev_examples": 4, "test_examples": 4},
    )
    for name, (kind, settings) in FAMILIES.items():
        family(kind, **settings).save_pretrained(folder / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
        if name == "roberta":
            tokenizer.add_special_tokens({"mask_token": "<mask>"})
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", ["none", "lora", "prefix"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_through_a_recipe(name: str, method: str, zoo: Path, ranks: Ranks) -> None:
    """test_families.py has all of them, and both estimators."""
    question = ["task.name=classification", 'task.label_words=["terrible","great"]']
    question += ["task.template='{text} It was {mask} .'" if name == "roberta" else "task.template='{text} It was'"]
    run = ranks.train(
        zoo, f"{name}-{method}", 1, f"model.path={name}", f"peft.method={method}", *question, "zeroth_order.lr=1e-2"
    )
    records = jobs.records(run)
    assert len(records) == 20
    assert "one direction at a time" not in (run / "log.txt").read_text()
    names = {info.name for info in read_journal(run / "journal").header.parameters}
    kept = load_file(next((run / "model").glob("*.safetensors")))
    assert names <= kept.keys()
    assert method == "none" or names == kept.keys()
    assert jobs.result(run)["weights_sha256"] != read_journal(run / "journal").header.base_sha256
