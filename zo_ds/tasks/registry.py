"""The tasks zo_ds knows by name, and what a recipe changes about them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace

from zo_ds.config.schema import DataConfig, TaskConfig
from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.errors import ConfigError
from zo_ds.tasks.library import PUBLISHED
from zo_ds.tasks.own import OWN
from zo_ds.tasks.prompts import MASK
from zo_ds.tasks.task import Metric, Objective, Task

TEXT = "{text}"
GENERATED = (Objective.F1, Objective.REWARD)
"""Objectives that hold generated text against something."""
WITHOUT_PROMPT = ("text", "chat")
"""Tasks whose rows are learned as a whole."""
TEMPLATES: dict[str, tuple[str, tuple[str, ...]] | None] = {
    "classification": None,  # template and label words come from the recipe
    "movie-sentiment": ("{text} It was", ("terrible", "great")),
    "movie-sentiment-masked": ("{text} It was {mask}.", ("terrible", "great")),
}
"""Classification by a template, whose rows have a text and a label."""
TASKS = (*TEMPLATES, *OWN, *PUBLISHED)


def resolve_task(config: TaskConfig, data: DataConfig | None = None) -> Task:
    """The task a recipe names, with the recipe's own settings in it.

    Args:
        config: the recipe's.
        data: names the columns of a classification task; their defaults if None.

    Raises:
        ConfigError: the name is unknown, or the template or the label words are missing or cannot work.
    """
    if config.name not in TASKS:
        near = difflib.get_close_matches(config.name, TASKS, n=1, cutoff=0.4)
        raise ConfigError(
            f"unknown task '{config.name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            where="task.name",
            why=f"known tasks: {', '.join(TASKS)}",
            remedy="use one of them; 'classification' takes task.template and task.label_words from the recipe",
        )
    if config.name in TEMPLATES:
        task = _classification(config, data or DataConfig(path="."))
    else:
        task = {**OWN, **PUBLISHED}[config.name]
        for key in ("template", "label_words"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"the task '{config.name}' has its own prompt",
                    where=f"task.{key}",
                    remedy=f"leave task.{key} away, or use task.name: classification",
                )
    return _with_objective(task, config)


def _with_objective(task: Task, config: TaskConfig) -> Task:
    objective = task.objective if config.objective == "auto" else Objective(config.objective)
    if (objective is Objective.REWARD) != (config.reward is not None):
        raise ConfigError(
            "a reward is the user's own function, and the objective that uses it",
            where="task.objective" if config.reward else "task.reward",
            why=f"objective is {objective.value}, reward is {config.reward}",
            remedy="set both: objective: reward and reward: module:function",
        )
    choosing = (Objective.CROSS_ENTROPY, Objective.MARGIN, Objective.ACCURACY)
    if objective in choosing and task.metric is not Metric.ACCURACY:
        raise ConfigError(
            f"the task '{task.name}' has no options to choose from",
            where=f"task.objective = {objective.value}",
            remedy=f"use {task.objective.value}" + (" or f1" if task.max_new_tokens else ""),
        )
    if objective is Objective.F1 and task.metric is not Metric.F1:
        raise ConfigError(
            f"the task '{task.name}' has no accepted answers to hold a generated one against",
            where="task.objective = f1",
            remedy="f1 is for tasks whose answers are generated: squad, drop",
        )
    if objective is Objective.REWARD and task.name in WITHOUT_PROMPT:
        raise ConfigError(
            f"the rows of the task '{task.name}' have no prompt to write an answer to",
            where="task.objective = reward",
            remedy="use task.name: completion",
        )
    metric = Metric.REWARD if objective is Objective.REWARD and task.metric is Metric.LOSS else task.metric
    tokens = config.max_new_tokens or task.max_new_tokens
    if objective in GENERATED and not tokens:
        raise ConfigError(
            "the length of generated answers is not known",
            where="task.max_new_tokens",
            remedy="set it, for example task.max_new_tokens=32",
        )
    return replace(task, objective=objective, metric=metric, max_new_tokens=tokens)


def _classification(config: TaskConfig, data: DataConfig) -> Task:
    preset = TEMPLATES[config.name]
    template = config.template or (preset[0] if preset else None)
    words = config.label_words or (preset[1] if preset else None)
    if template is None or words is None:
        raise ConfigError(
            f"task '{config.name}' needs {'a template' if template is None else 'label words'}",
            where="task.template" if template is None else "task.label_words",
            remedy='for example template: "{text} It was" and label_words: [terrible, great]',
        )
    if template.count(TEXT) != 1:
        raise ConfigError("a template has '{text}' exactly once", where=f"task.template = {template!r}")
    if len(words) < 2 or len(set(words)) != len(words) or not all(word.strip() for word in words):
        raise ConfigError("label words are two or more different words", where=f"task.label_words = {list(words)}")
    read = reader(template, words, data.text_field, data.label_field)
    return Task(config.name, read, words, template, masked=MASK in template)


def reader(
    template: str, words: Sequence[str], text_field: str = "text", label_field: str = "label"
) -> Callable[[Row], list[Example]]:
    """What reads the rows of a classification task.

    Args:
        template: with ``{text}`` once.
        words: answer for each class.
        text_field: column of the text.
        label_field: column of the label.
    """
    before, after = template.split(TEXT)
    # A word joins with a space, unless the prompt ends in one.
    joint = "" if template[-1:].isspace() else " "
    options = tuple(f"{joint}{word}" for word in words)

    def read(row: Row) -> list[Example]:
        text, label = row.text(text_field), row.label(label_field, words)
        return [
            Example(text, label, before, after, options, neutral=f"{before}{after}".strip() or None, where=row.where)
        ]

    return read
