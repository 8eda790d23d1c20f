"""A batched step holds a layer's scratch and activations beyond inference, and nothing of the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.launch

# Large blocks go back to the system when they are freed, so that the peak is what was in use.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
LAYER_MIB = 768 * 3072 * 4 / 2**20
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import OPTConfig, OPTForCausalLM
import zo_ds
from zo_ds.forward.loss import model_loss

def peak(job):
    Path("/proc/self/clear_refs").write_text("5")
    job()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

examples, settings = json.loads(sys.argv[1])
model = OPTForCausalLM(OPTConfig(vocab_size=500, hidden_size=768, ffn_dim=3072, num_hidden_layers=10,
                                 num_attention_heads=12, max_position_embeddings=64, word_embed_proj_dim=768))
size = sum(p.nbytes for p in model.parameters()) / 2**20
engine = zo_ds.initialize(model, {"zeroth_order": {"num_directions": 8, **settings}})
ids = torch.randint(4, 500, (examples, 32), generator=torch.Generator().manual_seed(0))
batch = {"input_ids": ids, "labels": ids}
engine.step(batch)
inference = peak(lambda: engine.call(model_loss, batch))
print(json.dumps([size, peak(lambda: engine.step(batch)) - inference]))
"""


def extra_mib(examples: int, **settings: Any) -> tuple[float, float]:
    """The model's size and what a step takes beyond inference."""
    command = [sys.executable, "-c", SCRIPT, json.dumps([examples, settings])]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=300)
    size, extra = json.loads(done.stdout.strip().splitlines()[-1])
    return size, extra


@pytest.mark.parametrize("noise", ["dense", "factored"])
def test_few_tokens_take_a_layer_of_scratch(noise: str) -> None:
    size, extra = extra_mib(1, noise=noise)
    assert size > 250
    assert extra < 3 * LAYER_MIB


def test_activations_keep_to_the_budget() -> None:
    """16 x 32 tokens: the largest activation of a place has 6 MiB, so that 9 of them need more than the budget."""
    _, within = extra_mib(16, activation_budget_mib=50)
    _, without = extra_mib(16, replicas_per_pass=9)
    assert within < 50 + 2 * LAYER_MIB
    assert without > 1.3 * within
