"""Started by a launcher: every family, whole and with adapters, under both estimators; one JSON line for each."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import VOCABULARY
from tests.unit.families import SPECS, family
from zo_ds.config.schema import PeftConfig
from zo_ds.engine.initialize import initialize
from zo_ds.forward.backbone import without_adapters
from zo_ds.forward.head import logits_at
from zo_ds.maths.noise import splitmix64
from zo_ds.models.adapters import adapt
from zo_ds.models.load import LoadedModel
from zo_ds.parallel.launched import open_channel
from zo_ds.trainer.start import source_of_start

STEPS = 20
EXAMPLES, LENGTH = 2, 6
"""Of a micro-batch; two micro-batches a step."""
LRS = {"fzoo": 2e-2, "mezo": 1e-3}
FAMILIES = [name for name in SPECS if "moe" not in name and name != "mixtral"]
ADAPTERS = ("none", "lora", "prefix")


class Words:
    """What adapters need of a tokenizer."""

    vocab_size = VOCABULARY
    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return VOCABULARY

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}


def micro_batch(step: int, unit: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(splitmix64(step * 2 + unit) % 2**31)
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Which of three classes the first token is in, from a head or from three words at the last place."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "Classification" in type(without_adapters(model)).__name__:
        scores = model(**inputs).logits
    else:
        rows = torch.arange(EXAMPLES)
        scores = logits_at(model, inputs, rows, torch.full_like(rows, LENGTH - 1))[:, 3:6]
    return nn.functional.cross_entropy(scores.float(), batch["labels"], reduction="none")


def head_of(name: str) -> str:
    if name.endswith("classes"):
        return "sequence_classification"
    return "masked_lm" if name.endswith("mlm") else "causal_lm"


class Warnings(logging.Handler):
    """Keeps what was said of directions that run alone."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def one(name: str, method: str, estimator: str) -> dict[str, Any]:
    """Train 20 steps; what became of it."""
    heard = Warnings()
    logging.getLogger("zo_ds").addHandler(heard)
    found: dict[str, Any] = {"family": name, "peft": method, "estimator": estimator}
    channel = open_channel(60)
    module = family(name)
    loaded = adapt(LoadedModel(module, Words(), head_of(name), 16), PeftConfig(method=method))  # type: ignore[arg-type]
    config = {
        "train_micro_batch_size_per_gpu": EXAMPLES,
        "zeroth_order": {
            "estimator": estimator,
            "num_directions": 4 if estimator == "fzoo" else 2,
            "eps": 1e-2,
            "lr": LRS[estimator],
        },
    }
    engine = initialize(loaded.module, config, loss_fn=loss, channel=channel)
    if loaded.start is not None:
        values = engine.call(lambda model, _: loaded.start(model), None)  # type: ignore[misc]
        engine.load_weights(source_of_start(values))
    before = engine.digest()
    losses, skips = [], 0
    for step in range(STEPS):
        out = engine.step(micro_batch(step, engine.grid.data_rank))
        losses.append(out.clean_loss)
        skips += out.skip is not None
    found |= {
        "losses": losses,
        "skips": skips,
        "moved": engine.digest() != before,
        "digest": engine.digest(),
        "trained": engine.store.trained,
        "total": engine.store.total,
        "alone": [text for text in heard.said if "one direction at a time" in text],
        "ranks": channel.world_size,
    }
    # One engine after the other in the same processes.
    engine.close()
    logging.getLogger("zo_ds").removeHandler(heard)
    return found


def main() -> None:
    at = next(number for number, word in enumerate(sys.argv) if Path(word).is_dir() and number)
    folder, names = Path(sys.argv[at]), sys.argv[at + 1 :]
    torch.set_num_threads(1)
    with (folder / f"rank{os.environ['RANK']}.jsonl").open("w", encoding="utf-8") as file:
        for name in names:
            for method in ADAPTERS:
                for estimator in LRS:
                    file.write(json.dumps(one(name, method, estimator)) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
