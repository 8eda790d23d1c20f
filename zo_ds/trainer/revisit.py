"""`zo_ds eval` and `zo_ds replay`: what is done with a run that is over (or was killed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from zo_ds.config.load import load_config
from zo_ds.engine.export import save_pretrained
from zo_ds.engine.initialize import initialize
from zo_ds.errors import ConfigError, CorruptRunError
from zo_ds.evaluation.accuracy import evaluate
from zo_ds.journal.journal import read_journal
from zo_ds.journal.replay import replay_
from zo_ds.models.load import load_model
from zo_ds.parallel.channel import open_channel
from zo_ds.stores.base import trainable_parameters
from zo_ds.stores.resident import ResidentStore
from zo_ds.trainer.environment import use_threads
from zo_ds.trainer.job import check, load, read_weights, settle
from zo_ds.trainer.report import log
from zo_ds.trainer.run_dir import read_result
from zo_ds.trainer.train import JOURNAL


def evaluate_run(run: Path) -> dict[str, Any]:
    """Score the model a run kept on its test set.

    Returns:
        accuracy, loss, test_examples, weights_sha256.

    Raises:
        DataError: the directory is no run, or holds no model.
    """
    read_result(run)
    config = load_config(run / "resolved.yaml")
    weights = read_weights(run / "model")
    channel = open_channel(config.parallel.timeout_s)
    use_threads(config.parallel.threads, channel.local_world_size)
    plan = check(config, channel)
    loaded, scorer = load(plan)
    engine = initialize(loaded.module, config, loss_fn=scorer.loss, channel=channel)
    settle(engine, scorer, plan)
    engine.load_weights(weights)
    batch_size = config.training.eval_batch_size
    found = evaluate(engine.call, scorer, plan.splits.test, batch_size, channel, engine.device)
    result = {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "test_examples": found.examples,
        "weights_sha256": engine.digest(),
    }
    engine.close()
    return result


def replay_run(run: Path, steps: int | None, save_to: Path | None) -> dict[str, Any]:
    """Rebuild a run's weights from its base model and its journal, without data.

    Args:
        run: its directory.
        steps: how many steps; None: those of the model that the run kept, or all if it did not finish.
        save_to: folder for the model, in Hugging Face layout; None: only check.

    Returns:
        steps, weights_sha256, and matches: whether that is the digest in result.json (None if there is none to
        compare with).

    Raises:
        DataError: the directory is no run.
        ConfigError: the journal has fewer steps.
        CorruptRunError: the journal is damaged, the base model is another, or the weights are not those of result.json.
    """
    result = read_result(run)
    config = load_config(run / "resolved.yaml")
    journal = read_journal(run / JOURNAL)
    kept = result["best_step"] if result is not None else None
    if steps is None:
        steps = kept if kept is not None else len(journal.records)
    if not 0 <= steps <= len(journal.records):
        raise ConfigError(f"the journal has {len(journal.records)} steps, not {steps}", where="--steps")
    loaded = load_model(config.model, len(config.task.label_words or ()))
    parameters = trainable_parameters(loaded.module)
    log.info("%s", f"replaying {steps} steps on {len(parameters)} parameters of {config.model.path}")
    digest = replay_({info.name: _data(p) for p, info in parameters.items()}, journal, steps)
    matches = digest == result["weights_sha256"] if result is not None and steps == kept else None
    if matches is False:
        raise CorruptRunError(
            "the replayed weights are not those of the run",
            where=str(run / JOURNAL),
            why=f"SHA-256 {digest[:16]}..., result.json has {result['weights_sha256'][:16] if result else ''}...",
            remedy="check that journal.jsonl and result.json belong to the same run",
        )
    if save_to is not None:
        store = ResidentStore(loaded.module, parameters, journal.header.noise)
        save_pretrained(store, save_to, loaded.tokenizer)
    return {"steps": steps, "weights_sha256": digest, "matches": matches}


def _data(parameter: nn.Parameter) -> Any:
    parameter.data = parameter.data.contiguous()
    return parameter.data
