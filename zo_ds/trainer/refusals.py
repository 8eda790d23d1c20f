"""What a method cannot do with a task or a model, said before anything in the run directory is touched."""

from __future__ import annotations

from zo_ds.engine.open_first_order import products
from zo_ds.errors import ConfigError
from zo_ds.models.load import LoadedModel
from zo_ds.tasks.registry import WITHOUT_PROMPT
from zo_ds.tasks.task import Objective
from zo_ds.trainer.job import Plan

_WITHOUT_GRADIENT = (Objective.ACCURACY, Objective.F1, Objective.REWARD)


def refuse(plan: Plan, loaded: LoadedModel) -> None:
    """Check that the recipe's method suits its task and model.

    Raises:
        ConfigError: it does not.
    """
    checks = {"first_order": _first_order, "in_context": _in_context, "linear_probe": _linear_probe}
    if plan.config.method in checks:
        checks[plan.config.method](plan, loaded)


def _first_order(plan: Plan, loaded: LoadedModel) -> None:
    objective = plan.task.objective
    products(loaded.module)
    if objective in _WITHOUT_GRADIENT or loaded.start is not None:
        what = f"the objective {objective.value} has no gradient"
        raise ConfigError(
            what if loaded.start is None else "a prefix of real keys and values is for zeroth-order runs",
            where="method: first_order",
            remedy="use method: zeroth_order, or task.objective: auto" if loaded.start is None else "peft.start: noise",
        )


def _in_context(plan: Plan, loaded: LoadedModel) -> None:
    if loaded.head != "causal_lm":
        raise ConfigError(
            "only a causal LM learns from what stands before",
            where=f"method: in_context, model.head is {loaded.head}",
            remedy="use a causal LM, or method: zero_shot",
        )
    if plan.task.name in WITHOUT_PROMPT:
        raise ConfigError(
            f"the rows of the task '{plan.task.name}' have no answer to show",
            where="method: in_context",
            remedy="use task.name: completion, or method: zero_shot",
        )


def _linear_probe(plan: Plan, loaded: LoadedModel) -> None:
    if not plan.task.label_words or loaded.head == "sequence_classification":
        raise ConfigError(
            "a linear probe classifies what a language model makes of a prompt",
            where="method: linear_probe",
            why=f"the task has {len(plan.task.label_words)} classes, model.head is {loaded.head}",
            remedy="use a task with label words, and a causal or masked LM",
        )
