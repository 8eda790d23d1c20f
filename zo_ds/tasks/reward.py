"""A user's own judge of generated text. Only functions that were marked as one are called: a recipe is a file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from zo_ds.errors import ConfigError

Reward = Callable[[str, str, Sequence[str]], float]
"""(prompt, generated text, accepted answers) -> what it is worth; more is better."""
Marked = TypeVar("Marked", bound=Reward)
_MARK = "__zo_ds_reward__"


def reward(function: Marked) -> Marked:
    """Mark a function as a reward, so that `task.reward` may name it.

    Args:
        function: (prompt, generated text, accepted answers) -> float, more is better. It is called for every generated
            answer, and must return the same number for the same text on every rank.
    """
    setattr(function, _MARK, True)
    return function


def find_reward(name: str) -> Reward:
    """The function that a recipe names as ``module:function``; the module must be importable.

    Raises:
        ConfigError: there is none, or it is not marked by `reward`: a recipe that somebody else wrote shall not call
            any function it likes.
    """
    module, _, function = name.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's own code
        raise ConfigError(
            f"there is no reward function '{name}'",
            where="task.reward",
            why=f"{type(error).__name__}: {error}",
            remedy="name a function of a module that Python finds: PYTHONPATH=. and task.reward=my_rewards:brevity",
        ) from error
    if getattr(found, _MARK, False) is not True:
        raise ConfigError(
            f"'{name}' is not marked as a reward",
            where="task.reward",
            why="a recipe may only call functions that were written for it",
            remedy="put @zo_ds.reward above it",
        )
    return found
