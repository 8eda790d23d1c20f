"""Little more than 16 (N + 1) bytes of a step leave a rank, whatever the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.launch import jobs
from tests.launch.ranks import Ranks
from tests.launch.test_layouts import PLACES, SHARD_GROUP, SHARED_HOST, STORES, rows

pytestmark = pytest.mark.launch

HEAD, VOTE, COMMIT = 24, 8, 2
"""Bytes that a rank gives to each other one in a step beside 16 for each of its places: what its share is, a digest of
the update, and whether its record is on disk and it wants to stop."""
ROUNDS, HASH, WRITTEN = 8, 8, 4
"""The number of forwards, in a shard group; the state hash, where it is due; that the node's weights have been updated,
with shared_host."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exchange")
    jobs.make_recipe(
        folder,
        zeroth_order={"lr": 0.02, "num_directions": PLACES - 1, "strict": True},
        training={"batch_size": 8, "micro_batch_size": 2, "eval_every": None},
    )
    return folder


DRIVER = '''
"""Two models, one after the other, on the same ranks: what goes through torch.distributed, what over the channel."""
import collections, json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist

calls = collections.defaultdict(list)
KINDS = ["all_gather_into_tensor", "all_gather", "_all_gather_base", "all_reduce", "broadcast", "reduce", "gather",
         "scatter", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all", "barrier",
         "all_to_all_single", "send", "recv", "isend", "irecv", "all_gather_object", "broadcast_object_list",
         "all_gather_coalesced", "all_reduce_coalesced", "gather_object", "scatter_object_list", "monitored_barrier"]


def nbytes(value):
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


def wrap(kind, function):
    def call(*given, **named):
        group = named.get("group") or next((g for g in given if isinstance(g, dist.ProcessGroup)), None)
        largest = max(map(nbytes, [*given, *named.values()]), default=0)
        calls["inside"].append((kind, dist.get_world_size(group), largest))
        return function(*given, **named)
    return call


for kind in KINDS:
    if hasattr(dist, kind):
        wrapped = wrap(kind, getattr(dist, kind))
        setattr(dist, kind, wrapped)
        setattr(dist.distributed_c10d, kind, wrapped)

from transformers import LlamaConfig, LlamaForCausalLM
import zo_ds
from zo_ds.parallel.launched import open_channel


class Counting:
    """Also counts by itself what the channel says it has sent."""
    def __init__(self, channel):
        self._channel = channel
    def __getattr__(self, name):
        return getattr(self._channel, name)
    def all_gather(self, values):
        calls["across"].append(values.nbytes)
        return self._channel.all_gather(values)
    def broadcast(self, payload):
        calls["broadcasts"].append(len(payload))
        return self._channel.broadcast(payload)


torch.set_num_threads(1)
channel, found = Counting(open_channel(60, "tcp")), {}
for width, population in ((96, 1), (288, 1), (288, 2)):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16,
                         tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    size = sum(p.numel() for p in model.parameters())
    engine = zo_ds.initialize(
        model,
        {"zeroth_order": {"lr": 1e-3, "strict": True, "num_directions": 8}, "zero_optimization": {"stage": 3},
         "train_micro_batch_size_per_gpu": 2},
        loss_fn=lambda model, batch: model(input_ids=batch, labels=batch).loss, channel=channel,
        parallel={"layout": "shard_group", "shard_size": 2, "population": population})
    ids = torch.randint(0, 4096, (4, 2, 8), generator=torch.Generator().manual_seed(0))
    steps = []
    for step in range(2):
        calls.clear()
        out = engine.step([ids[unit] for unit in engine.grid.units(4)])
        steps.append({"inside": list(calls["inside"]), "across": list(calls["across"]), "sent": out.sent,
                      "broadcasts": list(calls["broadcasts"])})
    worlds = [dist.get_world_size(group) for group in list(dist.distributed_c10d._world.pg_map)]
    found[f"{size} {population}"] = {
        "steps": steps, "worlds": worlds, "world": dist.get_world_size(), "replica": engine.layout.replica,
        "digest": engine.digest(), "coefficients": out.coefficients.tolist()}
Path(f"{sys.argv[1]}-{channel.rank}.json").write_text(json.dumps(found))
engine.close()
'''


def test_only_scalars_leave_a_shard_group(tmp_path: Path) -> None:
    """Two groups of two ranks. The constant is 24 + 8 + 2 + 8 = 42 bytes, to each of the three other ranks."""
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun: list[str | Path] = [
        jobs.BIN / "torchrun",
        "--nproc_per_node",
        "4",
        "--master_port",
        str(jobs.free_port()),
    ]
    done = jobs.run([*torchrun, "driver.py", "found"], tmp_path, 200, PYTHONPATH=str(jobs.ROOT), OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(4)]
    sizes = [int(key.split()[0]) for key in found[0]]
    assert 0.5e6 < sizes[0] < 1.5e6 < 5e6 < sizes[1] == sizes[2] < 10e6
    constant = HEAD + VOTE + COMMIT + ROUNDS
    for number, rank in enumerate(found):
        for key, one in rank.items():
            size, population = map(int, key.split())
            share = {1: PLACES, 2: 6}[population]  # places are computed 3 at a time: 2 ranks have 6 and 3
            # Not a group of a larger world: torch.distributed knows of no ranks beside the two that share weights.
            assert one["replica"] == number // 2
            assert (one["world"], set(one["worlds"])) == (2, {2})
            for step in one["steps"]:
                assert {world for _, world, _ in step["inside"]} == {2}
                assert sum(nbytes for *_, nbytes in step["inside"]) > 4 * size  # weights are gathered in there
                assert sum(step["across"]) == 16 * share + constant
                assert step["sent"] == 3 * sum(step["across"])
                assert not step["broadcasts"]
    for key in found[0]:
        assert len({rank[key]["digest"] for rank in found}) == 1
        assert len({tuple(rank[key]["coefficients"]) for rank in found}) == 1
    one, other = (found[0][key] for key in found[0] if key.split()[0] == str(sizes[1]))
    assert (one["digest"], one["coefficients"]) == (other["digest"], other["coefficients"])


@pytest.mark.parametrize(
    ("count", "store", "arguments", "share", "constant"),
    [
        (2, "resident", ("parallel.data=2",), 9, 0),
        (2, "resident", ("parallel.population=2",), 6, 0),
        (3, "resident", ("parallel.population=3",), 3, 0),
        (2, "cpu", (SHARED_HOST,), 9, WRITTEN),
        (2, "none", (SHARD_GROUP,), 9, ROUNDS),
    ],
    ids=["data-2", "population-2", "population-3", "shared-host", "shard-group"],
)
def test_sent_bytes_are_in_the_metrics(
    count: int, store: str, arguments: tuple[str, ...], share: int, constant: int, ranks: Ranks, folder: Path
) -> None:
    name = f"sent-{count}-{store}-{share}"
    run = ranks.train(folder, name, count, STORES[store], *arguments, "training.steps=6", "journal.hash_every=5")
    each = 16 * share + HEAD + VOTE + COMMIT + constant
    hashed = [HASH + (1 if SHARD_GROUP in arguments else 0) if step % 5 == 0 else 0 for step in range(6)]
    assert [row["sent_bytes"] for row in rows(run)] == [(count - 1) * (each + extra) for extra in hashed]


WIRE = 300
"""Bytes of a step and rank beside 16 for each place: 215 are measured. 34 say what they are; in each of the three
exchanges 8 bytes go before the data, and its packet has 52 bytes of heads."""


def test_bytes_on_the_wire_do_not_depend_on_the_model(ranks: Ranks, tmp_path: Path) -> None:
    if not ranks.isolated:
        pytest.skip("this machine gives a process no network of its own")
    jobs.make_recipe(
        tmp_path,
        zeroth_order={"lr": 1e-3, "num_directions": PLACES - 1},
        training={"batch_size": 4, "micro_batch_size": 2, "eval_every": 1000},
        output={"save_model": False},
        journal={"hash_every": 1000, "audit_every": 1000},
    )
    shutil.copytree(tmp_path / "model", tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    config.update(hidden_size=160, intermediate_size=1120)
    config.pop("head_dim", None)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "large")
    added = {}
    for model in ("model", "large"):
        few, many = 5, 65
        spent = {}
        for steps in (few, many):
            before = ranks.lo_bytes()
            run = ranks.train(tmp_path, f"{model}-{steps}", 2, f"model.path={model}", f"training.steps={steps}")
            spent[steps] = ranks.lo_bytes() - before
            sent = {row["sent_bytes"] for row in rows(run)[1:]}
            assert sent == {16 * PLACES + HEAD + VOTE + COMMIT}
        added[model] = (spent[many] - spent[few]) / (many - few) / 2
    print(f"bytes on lo for each step and rank: {added}")
    weights = {model: (tmp_path / model / "model.safetensors").stat().st_size for model in added}
    assert weights["large"] > 30 * weights["model"]
    # Acknowledgements travel with what is sent, or alone, as the machine has time: both models are held to one bound.
    for each in added.values():
        assert 16 * PLACES < each < 16 * PLACES + WIRE
