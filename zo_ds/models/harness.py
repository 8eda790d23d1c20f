"""The `lm-eval` harness on a model as it stands in memory."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from zo_ds.errors import ConfigError


def lm_eval_scores(
    module: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    device: str,
    *,
    limit: int | None,
    batch_size: int,
    include: str | None,
) -> dict[str, dict[str, float]]:
    """Scores of a causal LM on tasks of the harness.

    Args:
        module: of transformers; it must be callable as it is.
        tokenizer: its own.
        tasks: names of the harness.
        device: where the model runs.
        limit: examples of each task; None: all.
        batch_size: sequences in one forward pass.
        include: folder with further task files.

    Returns:
        By task, the harness's numbers by its own names ("acc,none").

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
    """
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        hugging_face: Any = importlib.import_module("lm_eval.models.huggingface")
        registry: Any = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise ConfigError(
            "the lm-eval harness is not installed",
            where="zo_ds eval --lm-eval",
            why=str(error),
            remedy="pip install 'zo_ds[lm-eval]'",
        ) from error
    known = registry.TaskManager(include_path=include)
    unknown = [task for task in tasks if task not in known.all_tasks]
    if unknown:
        raise ConfigError(
            f"the harness knows no task '{unknown[0]}'",
            where="zo_ds eval --lm-eval",
            remedy="`lm-eval ls tasks` lists them; --include names a folder with task files of your own",
        )
    model = hugging_face.HFLM(pretrained=module, tokenizer=tokenizer, batch_size=batch_size, device=device)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), limit=limit, task_manager=known, bootstrap_iters=0, log_samples=False
    )
    return {
        task: {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
