"""`zo_ds data preview`: examples as the model gets them."""

from __future__ import annotations

from collections import Counter

from zo_ds.config.schema import ZOConfig
from zo_ds.parallel.channel import SoloChannel
from zo_ds.trainer.job import check, load, truncation_note


def preview(config: ZOConfig, count: int) -> str:
    """How many examples there are, the first few as the model gets them, and what the loss sees of them.

    Args:
        config: a recipe.
        count: how many training examples to show.

    Raises:
        ZODSError: the recipe or its data is refused.
    """
    plan = check(config, SoloChannel())
    _, asking = load(plan)
    task, splits = plan.task, plan.splits
    lines = [
        f"task {task.name}: objective {task.objective.value}, metric {asking.metric}",
        *[f"{name}: {len(part)} examples" for name, part in vars(splits).items()],
    ]
    if task.label_words:
        found = Counter(example.label for example in splits.train)
        lines.append(
            "train, by label: " + ", ".join(f"{word} {found[label]}" for label, word in enumerate(task.label_words))
        )
    lengths = sorted(map(asking.learner.length, splits.train))
    lines.append(
        f"tokens of a training example: median {lengths[len(lengths) // 2]}, most {lengths[-1]}, "
        f"limit {asking.learner.prompts.max_tokens}"
    )
    note = truncation_note(asking, splits)
    for number, example in enumerate(splits.train[:count], start=1):
        lines += ["", f"example {number}, {example.where}", asking.learner.preview(example)]
        if asking.judge is not asking.learner:
            lines += ["as it is evaluated:", asking.judge.preview(example)]
    return "\n".join(lines + (["", f"note: {note}"] if note else []))
