"""Baselines that train nothing, or nothing but a linear classifier: zero-shot, in-context, linear probe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_ds.data.examples import Example
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.initialize import initialize
from zo_ds.errors import DataError
from zo_ds.evaluation.evaluate import Evaluation, evaluate
from zo_ds.evaluation.features import features
from zo_ds.evaluation.probe import Sample
from zo_ds.evaluation.probe import linear_probe as fit_probe
from zo_ds.tasks.demonstrations import Demonstrations
from zo_ds.trainer.job import settle
from zo_ds.trainer.report import Progress, clock, log
from zo_ds.trainer.result import result_of
from zo_ds.trainer.run import Run
from zo_ds.trainer.zeroth_order import guard_of


def zero_shot(run: Run) -> dict[str, Any]:
    """Score the model as it is; returns what result.json holds; collective."""
    return _scored(run, run.plan.splits.test, "zero-shot")


def in_context(run: Run) -> dict[str, Any]:
    """Score the model behind answered training examples; returns what result.json holds; collective."""
    config, prompts = run.plan.config, run.asking.judge.prompts
    shots = config.in_context.shots
    found = Demonstrations(run.plan.splits.train, shots, config.data.seed, prompts)

    def room(example: Example) -> int:
        # One more, since an option may be split otherwise behind the prompt.
        return max([run.plan.task.max_new_tokens, *(prompts.count(option) + 1 for option in example.options)])

    examples = [found.before(example, room(example)) for example in run.plan.splits.test]
    if found.dropped:
        log.warning("%s", f"{found.dropped} of {len(examples)} prompts do not hold all {shots} demonstrations")
    return _scored(run, examples, f"behind {shots} demonstrations")


def linear_probe(run: Run) -> dict[str, Any]:
    """Train a linear classifier on the model's representations; returns what result.json holds; collective.

    Raises:
        ConfigError: the model's head cannot be told apart.
        DataError: a representation is not finite.
    """
    task, splits = run.plan.task, run.plan.splits
    train, dev, test = _samples(run)
    try:
        probe = fit_probe(train, dev, test, task.classes)
    except ValueError as error:
        raise DataError("a linear probe cannot be fitted", where="method: linear_probe", why=str(error)) from error
    log.info("%s", f"test accuracy {probe.accuracy:.4f}, penalty {probe.strength:g} (dev {probe.dev_accuracy:.4f})")
    found = Evaluation("accuracy", {"accuracy": probe.accuracy, "loss": probe.loss}, len(splits.test))
    forwards = -(-len(splits.train) // run.plan.config.training.micro_batch_size)
    return _result(run, found, forwards) | {"penalty": probe.strength, "dev_accuracy": probe.dev_accuracy}


def _samples(run: Run) -> list[Sample]:
    engine, judge, samples = _engine(run), run.asking.judge, []
    mask = run.loaded.tokenizer.mask_token_id if run.loaded.head == "masked_lm" else None
    splits, batch_size = run.plan.splits, run.plan.config.training.eval_batch_size
    for name, examples in (("train", splits.train), ("dev", splits.dev), ("test", splits.test)):
        begun = time.perf_counter()
        found = features(
            engine.call,
            judge,
            examples,
            batch_size,
            run.channel,
            engine.device,
            mask_token=mask,
            lockstep=engine.layout.lockstep,
        )
        samples.append(Sample(found, torch.tensor([example.label for example in examples])))
        log.info("%s", f"representations of {len(examples)} {name} examples in {clock(time.perf_counter() - begun)}")
    engine.close()
    return samples


def _scored(run: Run, examples: Sequence[Example], how: str) -> dict[str, Any]:
    engine = _engine(run)
    with guard_of(run) as guard:

        def call(function: Callable[[torch.nn.Module, Any], Tensor], batch: Any) -> Tensor:
            guard.beat()
            return engine.call(function, batch)

        batch_size, lockstep = run.plan.config.training.eval_batch_size, engine.layout.lockstep
        judge = run.asking.judge
        found = evaluate(call, judge, examples, batch_size, run.channel, engine.device, lockstep=lockstep)
    engine.close()
    log.info("%s", f"test {found} {how}")
    return _result(run, found, 0)


def _engine(run: Run) -> ZOEngine:
    """Holds the model wherever the recipe says, and lets it be called."""
    engine = initialize(
        run.loaded.module,
        run.plan.config,
        loss_fn=run.asking.loss_fn,
        channel=run.channel,
        weights=run.loaded.source,
    )
    settle(engine, run.asking, run.plan)
    return engine


def _result(run: Run, found: Evaluation, forwards: int) -> dict[str, Any]:
    with Progress(run.shown, 0, tensorboard=run.plan.config.output.tensorboard) as progress:
        progress.evaluation(0, "test", found)
    return result_of(found, forwards=forwards, seconds=time.perf_counter() - run.started)
