"""Times a training step against the forwards of the plain model, the sequential step, and what rivals publish.

    python tools/bench_step.py [--only memory,real,opt125m,small,published,profile] [--repeats N] [--json PATH]

Medians, all in one process. `plain` is transformers' own forward of the padded batch with its full logits; a step of N
directions is held against N + 1 of them. Two threads or as many as there are cores, one for what rivals publish.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import Bench, peak_mib, show, wait, write_json
from published import fzoo_step, mezo_step
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import zo_ds
from zo_ds.config.load import load_config
from zo_ds.engine.engine import ZOEngine
from zo_ds.forward import products
from zo_ds.forward.loss import model_loss
from zo_ds.ops import api
from zo_ds.parallel.channel import SoloChannel
from zo_ds.tasks.layout import pad
from zo_ds.trainer.environment import describe, use_threads
from zo_ds.trainer.job import check, encode_units, load, make_sampler, settle

N = 8
EPS, LR = 1e-3, 1e-4
SHAPES = {
    "opt125m": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "opt22m": {
        "vocab_size": 30522,
        "hidden_size": 384,
        "ffn_dim": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
}
TARGETS = {
    "step_over_forwards_real": ("<=", 0.60),
    "step_over_forwards_opt125m_dense": ("<=", 1.00),
    "step_over_forwards_opt125m_factored": ("<=", 1.00),
    "batched_over_sequential_1x16": ("<=", 0.65),
    "batched_over_sequential_4x16": ("<=", 0.65),
    "batched_over_sequential_1x16_factored": ("<=", 0.65),
    "batched_over_sequential_4x16_factored": ("<=", 0.65),
    "published_mezo_over_ours_16x64": (">=", 1.4),
    "published_mezo_over_ours_4x16": (">=", 8.0),
    "published_fzoo_over_ours_16x64": (">=", 1.8),
    "published_fzoo_over_ours_4x16": (">=", 10.0),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Found = dict[str, float]


def opt(shape: str) -> nn.Module:
    """A random OPT."""
    torch.manual_seed(0)
    model: nn.Module = OPTForCausalLM(OPTConfig(**SHAPES[shape], max_position_embeddings=512)).eval().to(DEVICE)
    return model


def open_engine(model: nn.Module, loss_fn: Any = None, **settings: Any) -> ZOEngine:
    """An engine as a user makes it."""
    config = {"zeroth_order": {"num_directions": N, "eps": EPS, "lr": LR, **settings}}
    return zo_ds.initialize(model, config, loss_fn=loss_fn, channel=SoloChannel())


def tokens(model: nn.Module, examples: int, length: int) -> dict[str, Tensor]:
    """Random tokens, every one of them a label."""
    vocabulary: Any = model.config
    ids = torch.randint(4, vocabulary.vocab_size, (examples, length), generator=torch.Generator().manual_seed(1))
    ids = ids.to(DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@torch.inference_mode()
def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The plain model's logits."""
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits


class Quickstart:
    """The quickstart's model, its data and an engine for them."""

    def __init__(self, forward: str = "batched") -> None:
        self._channel = SoloChannel()
        config = load_config(Path("configs/quickstart.yaml"), [f"zeroth_order.forward={forward}"])
        self._plan = check(config, self._channel)
        loaded, asking = load(self._plan)
        self.scorer = asking.learner
        self._sampler = make_sampler(config, self._plan.task, self._plan.splits, self.scorer)
        self.model = loaded.module
        self.engine = zo_ds.initialize(
            loaded.module, config, loss_fn=asking.loss_fn, channel=self._channel, weights=loaded.source
        )
        if forward == "batched":
            settle(self.engine, asking, self._plan)

    def batch(self, step: int) -> tuple[list[Any], dict[str, Tensor]]:
        """A step's units of work, and the same sequences as a padded batch."""
        examples = [self._plan.splits.train[index] for index in self._sampler.indices(step)]
        padded = pad([self.scorer.prompts.encode(example) for example in examples], 0)
        units = encode_units(examples, len(examples), self.scorer, self.engine.grid, DEVICE)
        return units, {key: value.to(DEVICE) for key, value in padded.items()}


def real(repeats: int) -> Found:
    """The quickstart's own batches."""
    quickstart = Quickstart()
    bench = Bench(DEVICE, repeats)
    batches = 8
    for step in range(batches):
        units, padded = quickstart.batch(step)
        bench.add(f"plain {step}", partial(plain, quickstart.model, padded))
        bench.add(f"step {step}", partial(quickstart.engine.step, units))
        bench.add(f"without oneDNN {step}", partial(without_onednn, quickstart.engine, units))
    seconds = bench.run()
    whole = {
        kind: sum(seconds[f"{kind} {step}"] for step in range(batches)) for kind in ("plain", "step", "without oneDNN")
    }
    return {
        "real_plain_s": whole["plain"] / batches,
        "real_step_s": whole["step"] / batches,
        "step_over_forwards_real": whole["step"] / ((N + 1) * whole["plain"]),
        "step_over_forwards_real_without_onednn": whole["without oneDNN"] / ((N + 1) * whole["plain"]),
    }


def opt125m(repeats: int) -> Found:
    """16 x 64 random tokens, both structures; the same without oneDNN's products."""
    bench, found = Bench(DEVICE, repeats), {}
    model = opt("opt125m")
    batch = tokens(model, 16, 64)
    engines = {noise: open_engine(copy.deepcopy(model), noise=noise) for noise in ("dense", "factored")}
    bench.add("plain", partial(plain, model, batch))
    for noise, engine in engines.items():
        bench.add(noise, partial(engine.step, batch))
    bench.add("dense without oneDNN", partial(without_onednn, engines["dense"], batch))
    seconds = bench.run()
    for noise in engines:
        found[f"step_over_forwards_opt125m_{noise}"] = seconds[noise] / ((N + 1) * seconds["plain"])
    found["step_over_forwards_opt125m_dense_without_onednn"] = seconds["dense without oneDNN"] / (
        (N + 1) * seconds["plain"]
    )
    return {"opt125m_plain_s": seconds["plain"], **found}


def profile(repeats: int) -> Found:
    """Where the quickstart's step spends its time, sequential and batched."""
    found: Found = {}
    for forward in ("sequential", "batched"):
        quickstart = Quickstart(forward)
        rows: list[Found] = []
        for step in range(repeats + 2):
            units, _ = quickstart.batch(step)
            with Phases() as phases:
                quickstart.engine.step(units)
            rows.append(phases.seconds)
        for phase in rows[0]:
            # The first step learns and verifies.
            found[f"profile_{forward}_{phase}_s"] = statistics.median(row[phase] for row in rows[2:])
    return found


class Phases:
    """Time spent in what a step consists of, within a context; what is left are elementwise operations and Python."""

    PARTS: tuple[tuple[Any, str, str], ...] = (
        (api, "perturb", "perturbation"),
        (api, "embedding_rows", "perturbation"),
        (api, "apply_", "update"),
        (products, "linear", "products"),
        (nn.functional, "linear", "products"),
        (nn.functional, "scaled_dot_product_attention", "attention"),
    )

    def __init__(self) -> None:
        self.seconds: Found = dict.fromkeys(["products", "perturbation", "attention", "update", "rest", "whole"], 0.0)
        self._patches = ExitStack()

    def __enter__(self) -> Phases:
        for module, name, part in self.PARTS:
            timed = partial(self._timed, getattr(module, name), part)
            self._patches.enter_context(mock.patch.object(module, name, timed))
        self._begin = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds["whole"] = self._now() - self._begin
        self.seconds["rest"] = 2 * self.seconds["whole"] - sum(self.seconds.values())
        self._patches.close()

    def _timed(self, original: Callable[..., Any], part: str, *args: Any, **options: Any) -> Any:
        begin = self._now()
        try:
            return original(*args, **options)
        finally:
            self.seconds[part] += self._now() - begin

    @staticmethod
    def _now() -> float:
        wait(DEVICE)
        return time.perf_counter()


def without_onednn(engine: ZOEngine, batch: Any) -> None:
    """A step with the products that plain torch takes."""
    with mock.patch.object(products, "linear", nn.functional.linear):
        engine.step(batch)


def small(repeats: int) -> Found:
    """Few tokens: batched against sequential, and both against plain forwards."""
    bench, found = Bench(DEVICE, repeats), {}
    model = opt("opt125m")
    shapes = {"1x16": tokens(model, 1, 16), "4x16": tokens(model, 4, 16)}
    for noise in ("dense", "factored"):
        engines = {
            forward: open_engine(copy.deepcopy(model), noise=noise, forward=forward)
            for forward in ("batched", "sequential")
        }
        for shape, batch in shapes.items():
            bench.add(f"plain {shape}", partial(plain, model, batch))
            for forward, engine in engines.items():
                bench.add(f"{forward} {shape} {noise}", partial(engine.step, batch))
            bench.add(f"without oneDNN {shape} {noise}", partial(without_onednn, engines["batched"], batch))
    seconds = bench.run()
    for noise in ("dense", "factored"):
        for shape in shapes:
            ending = "" if noise == "dense" else "_factored"
            batched = seconds[f"batched {shape} {noise}"]
            sequential, mkl = seconds[f"sequential {shape} {noise}"], seconds[f"without oneDNN {shape} {noise}"]
            found[f"batched_over_sequential_{shape}{ending}"] = batched / sequential
            found[f"batched_over_sequential_{shape}{ending}_without_onednn"] = mkl / sequential
            found[f"step_over_forwards_{shape}{ending}"] = batched / ((N + 1) * seconds[f"plain {shape}"])
    return found


def published(repeats: int) -> Found:
    """Rivals' steps on a 22 M shape with one thread, per forward."""
    bench, found = Bench(DEVICE, repeats), {}
    for shape, (examples, length) in {"16x64": (16, 64), "4x16": (4, 16)}.items():
        model = opt("opt22m")
        batch = tokens(model, examples, length)
        engine = open_engine(copy.deepcopy(model))
        parameters = list(model.parameters())
        loss: Callable[[], Tensor] = partial(_loss, model, batch)
        bench.add(f"ours {shape}", partial(engine.step, batch), 1)
        bench.add(f"mezo {shape}", partial(mezo_step, parameters, loss, EPS, LR), 1)
        bench.add(f"fzoo {shape}", partial(fzoo_step, parameters, loss, EPS, LR, N), 1)
        bench.add(f"plain {shape}", partial(plain, model, batch), 1)
    seconds = bench.run()
    for shape in ("16x64", "4x16"):
        ours = seconds[f"ours {shape}"] / (N + 1)
        found[f"published_mezo_over_ours_{shape}"] = seconds[f"mezo {shape}"] / 2 / ours
        found[f"published_fzoo_over_ours_{shape}"] = seconds[f"fzoo {shape}"] / (N + 1) / ours
        for kind, forwards in (("mezo", 2), ("fzoo", N + 1), ("ours", N + 1)):
            found[f"{kind}_step_over_forwards_{shape}"] = (
                seconds[f"{kind} {shape}"] / forwards / seconds[f"plain {shape}"]
            )
    return found


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def memory(repeats: int) -> Found:
    """What a step holds beyond inference, at 16 x 64 tokens."""
    model = opt("opt125m")
    batch = tokens(model, 16, 64)
    engine = open_engine(model)
    at_inference = peak_mib(lambda: engine.call(model_loss, batch))
    engine.step(batch)
    return {
        "extra_memory_mib": peak_mib(lambda: engine.step(batch)) - at_inference,
        "inference_memory_mib": at_inference,
    }


# Memory first, before others leave freed blocks in the process.
CASES = {"memory": memory, "real": real, "opt125m": opt125m, "small": small, "published": published, "profile": profile}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = use_threads("auto", 1)
    environment = describe(1, threads)
    print(json.dumps(environment, indent=2))
    found: Found = {}
    for name in options.only.split(","):
        part = CASES[name](options.repeats)
        show(part, TARGETS)
        found.update(part)
    write_json(options.json, {**found, "environment": environment})


if __name__ == "__main__":
    main()
