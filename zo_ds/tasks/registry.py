"""The tasks zo_ds knows by name. A task is data: a template, label words, a class for each word."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from zo_ds.config.schema import TaskConfig
from zo_ds.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        template: prompt with ``{text}``, and ``{mask}`` for masked LMs.
        label_words: the answer for each class.
    """

    template: str
    label_words: tuple[str, ...]


TASKS: dict[str, Task | None] = {
    "classification": None,  # template and label words come from the recipe
    "movie-sentiment": Task("{text} It was", ("terrible", "great")),
    "movie-sentiment-masked": Task("{text} It was {mask}.", ("terrible", "great")),
}


def resolve_task(config: TaskConfig) -> Task:
    """The task a recipe names, with the recipe's own template and label words where it gives them.

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
    preset = TASKS[config.name]
    template = config.template or (preset.template if preset else None)
    words = config.label_words or (preset.label_words if preset else None)
    if template is None or words is None:
        raise ConfigError(
            f"task '{config.name}' needs {'a template' if template is None else 'label words'}",
            where="task.template" if template is None else "task.label_words",
            remedy='for example template: "{text} It was" and label_words: [terrible, great]',
        )
    if template.count("{text}") != 1:
        raise ConfigError("a template has '{text}' exactly once", where=f"task.template = {template!r}")
    if len(words) < 2 or len(set(words)) != len(words) or not all(word.strip() for word in words):
        raise ConfigError("label words are two or more different words", where=f"task.label_words = {list(words)}")
    return Task(template, tuple(words))
