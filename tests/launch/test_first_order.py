"""Gradients of several ranks: the steps of one rank, and the same weights on all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import jobs

pytestmark = pytest.mark.launch

DRIVER = """
import json, sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from zo_ds.config.load import validate
from zo_ds.config.schema import ZOConfig
from zo_ds.engine.open_first_order import initialize_first_order
from zo_ds.errors import PeerError
from zo_ds.parallel.launched import open_channel


def loss(model, batch):
    logits = model(input_ids=batch[:, :-1]).logits[:, -1, [5, 9]]
    return F.cross_entropy(logits, batch[:, -1], reduction="none")


torch.set_num_threads(1)
channel, found = open_channel(60, "tcp"), {}
for name, settings, size in (("adamw", {"lr": 1e-3, "eps": 1e-6, "max_grad_norm": 0.5}, 2),
                             ("sgd", {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, 4)):
    torch.manual_seed(channel.rank)  # DeepSpeed gives all ranks the weights of the first one
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True))
    config = validate(ZOConfig, {
        "model": {"path": "m"}, "data": {"path": "d"}, "method": "first_order", "first_order": settings,
        "training": {"steps": 12, "batch_size": 8, "micro_batch_size": size}}, where="here")
    engine = initialize_first_order(model, config, loss_fn=loss, channel=channel)
    ids = torch.randint(3, 40, (12, 8, 7), generator=torch.Generator().manual_seed(0))
    ids[:, :, -1] %= 2
    outs = [engine.step([ids[step, u * size:(u + 1) * size] for u in engine.grid.units(8 // size)])
            for step in range(12)]
    found[name] = {
        "units": len(engine.grid.units(8 // size)), "losses": [out.clean_loss for out in outs],
        "sent": outs[-1].sent, "forwards": outs[-1].forwards, "digest": engine.digest(), "memory": engine.memory,
        "after": engine.losses(ids[0]).tolist()}
unequal = [ids[0, :4 - channel.rank]]
try:
    engine.step(unequal)
    found["unequal"] = ""
except PeerError as error:
    found["unequal"] = str(error)
Path(f"{sys.argv[1]}-{channel.rank}.json").write_text(json.dumps(found))
engine.close()
"""


def run(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each rank of a job found."""
    name = f"of{count}"
    command = [jobs.BIN / "torchrun", "--nproc_per_node", str(count), "--master_port", str(jobs.free_port())]
    arguments = [*command, "driver.py", name]
    done = jobs.run(arguments, folder, 200, PYTHONPATH=str(jobs.ROOT), OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(count)]


def test_ranks_equal_one_rank(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    (alone,) = run(tmp_path, 1)
    assert alone["unequal"] == ""
    for count in (2, 3):
        ranks = run(tmp_path, count)
        for name in ("adamw", "sgd"):
            one, others = alone[name], [rank[name] for rank in ranks]
            for other in others:
                assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
                assert other["after"] == pytest.approx(one["after"], abs=1e-4)
                assert (other["forwards"], other["memory"]) == (one["forwards"], one["memory"])
                # Added up over the ranks, every gradient crosses twice between each and the next in the ring.
                gradients = one["memory"]["gradients"]
                assert 0 <= other["sent"] - 2 * (count - 1) * gradients // count < 200 * (count - 1)
            assert len({other["digest"] for other in others}) == 1
            assert len({tuple(other["losses"]) for other in others}) == 1
            assert abs(one["losses"][0] - one["losses"][-1]) > 1e-3
        assert all("micro-batches differ in size" in rank["unequal"] for rank in ranks)
    # Two micro-batches of four, three ranks: one of them has nothing to do and still takes part.
    assert [rank["sgd"]["units"] for rank in ranks] == [1, 1, 0]
    assert [rank["adamw"]["units"] for rank in ranks] == [2, 1, 1]
