"""What a study is: methods at a budget of forwards, each over a grid of learning rates, and the runs that makes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from zo_ds.config.load import load_config, read_yaml, validate
from zo_ds.config.schema import PositiveFloat, PositiveInt, Section, ZOConfig
from zo_ds.engine.first_order import FORWARDS_PER_UNIT
from zo_ds.errors import ConfigError
from zo_ds.maths.estimators import forwards

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")]
Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_OF_EVERY_RUN = ("output.save_model=false", "output.tensorboard=false", "parallel.threads=1")


class Method(Section):
    """A way to train, and the learning rates it is tuned over."""

    overrides: tuple[str, ...] = ()
    """`key=value` arguments of its runs, after those of the study."""
    lr_key: str
    """Setting that the grid is over."""
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """The grid, as many for every method."""
    budget: PositiveInt | None = None
    """Forwards of its runs, where it is to be seen what fewer of them give; None: the study's."""
    seeds: PositiveInt | None = None
    """Only the first so many seeds, for what is there to compare with; None: all."""


class Study(Section):
    """A comparison of methods on one recipe."""

    recipe: str
    """Base recipe, relative to the study's file."""
    overrides: tuple[str, ...] = ()
    """`key=value` arguments of all runs."""
    budget: PositiveInt
    """Forward passes of one micro-batch that a run may take, evaluations on dev and test not counted."""
    evaluations: PositiveInt = 8
    """Scores on the dev set over the budget, at most."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """The first one is what learning rates are chosen on; the chosen one is run on all."""
    seed_keys: tuple[str, ...] = ("data.seed", "zeroth_order.run_seed")
    """Settings that take the seed."""
    accuracies: tuple[Level, ...] = (0.65, 0.70, 0.75, 0.80)
    """Dev accuracies of which it is reported when they are reached."""
    losses: tuple[Level, ...] = ()
    """Dev losses of which it is reported when they are reached."""
    reference: str
    """Method whose final scores the others are measured against."""
    methods: dict[Name, Method]
    """By name."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.reference not in self.methods:
            raise ValueError(f"reference is '{self.reference}', the methods are {', '.join(self.methods)}")
        sizes = {name: len(set(method.lrs)) for name, method in self.methods.items()}
        if len(set(sizes.values())) > 1 or any(sizes[name] < len(m.lrs) for name, m in self.methods.items()):
            raise ValueError(f"every method is tuned over as many different learning rates, got {sizes}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is there twice: {self.seeds}")
        return self


def read_study(path: Path) -> Study:
    """The study in a YAML file.

    Raises:
        ConfigError: it is missing, or a key or value is refused.
    """
    tree = read_yaml(path)
    methods = tree.get("methods")
    try:
        # Each by itself first: the message then names the key within the method.
        for name, method in methods.items() if isinstance(methods, dict) else ():
            if isinstance(method, dict):
                validate(Method, method, where=f"{path}: methods.{name}")
        return validate(Study, tree, where=str(path))
    except ConfigError as error:
        raise ConfigError(
            error.what, where=error.where, remedy="correct the keys above, see tools/study_plan.py"
        ) from None


@dataclass(frozen=True)
class Run:
    """One training process of a study.

    Attributes:
        method: by name.
        lr: its learning rate.
        seed: of noise and order of the examples.
        steps: updates it makes.
        forwards_per_step: evaluations of one micro-batch.
        recipe: base recipe.
        overrides: `key=value` arguments, without the run directory.
        recipe_sha256: of the recipe's text.
    """

    method: str
    lr: float
    seed: int
    steps: int
    forwards_per_step: int
    recipe: Path
    overrides: tuple[str, ...]
    recipe_sha256: str

    @property
    def name(self) -> str:
        """Folder of the run: another recipe or other overrides, another name."""
        digest = hashlib.sha256("\n".join((self.recipe_sha256, *self.overrides)).encode()).hexdigest()
        return f"{self.method}-{self.lr:g}-{self.seed}-{digest[:8]}"

    @property
    def forwards(self) -> int:
        """Of the whole run."""
        return self.steps * self.forwards_per_step


@dataclass(frozen=True)
class Planned:
    """A method and what the budget buys of it.

    Attributes:
        name: of the method.
        lrs: its grid.
        seeds: of the study.
        steps: of each run.
        forwards_per_step: evaluations of one micro-batch.
        make: the run with a learning rate and a seed.
    """

    name: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    forwards_per_step: int
    make: Callable[[float, int], Run]

    @property
    def grid(self) -> list[Run]:
        """The runs that the learning rate is chosen by, on the first seed."""
        return [self.make(lr, self.seeds[0]) for lr in self.lrs]

    def chosen(self, lr: float) -> list[Run]:
        """The runs that are compared with other methods, one for each seed; the first one is of the grid."""
        return [self.make(lr, seed) for seed in self.seeds]

    @property
    def runs(self) -> int:
        """How many there are in all."""
        return len(self.lrs) + len(self.seeds) - 1

    @property
    def forwards(self) -> int:
        """Of one run."""
        return self.steps * self.forwards_per_step


def plan(study: Study, path: Path) -> list[Planned]:
    """What the budget buys of every method.

    Args:
        study: the study.
        path: of its file.

    Raises:
        ConfigError: a recipe or override is refused, a method takes no steps, the budget is less than one step, or
            methods count forwards of different micro-batches.
    """
    recipe = (path.parent / study.recipe).resolve()  # runs are started elsewhere
    found = {name: _planned(study, name, method, recipe) for name, method in study.methods.items()}
    sizes = {name: config.training.micro_batch_size for name, (_, config) in found.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"a forward pass is not the same work in every method: micro-batches of {_pairs(sizes)}",
            where=str(path),
            remedy="give all of them the same training.micro_batch_size; batch_size may differ",
        )
    return [planned for planned, _ in found.values()]


def _planned(study: Study, name: str, method: Method, recipe: Path) -> tuple[Planned, ZOConfig]:
    given = (*study.overrides, *method.overrides)
    config = load_config(recipe, [*given, *_OF_EVERY_RUN])
    per_step = forwards_per_step(config)
    budget = method.budget or study.budget
    steps = budget // per_step
    if not steps:
        raise ConfigError(f"a step of '{name}' takes {per_step} forwards, the budget is {budget}", where="budget")
    every = eval_every(steps, study.evaluations)
    common = (*given, *_OF_EVERY_RUN, f"training.steps={steps}", f"training.eval_every={every}")
    digest = hashlib.sha256(recipe.read_bytes()).hexdigest()

    def make(lr: float, seed: int) -> Run:
        seeds = (f"{key}={seed}" for key in study.seed_keys)
        overrides = (*common, f"{method.lr_key}={lr!r}", *seeds)
        return Run(name, lr, seed, steps, per_step, recipe, overrides, digest)

    planned = Planned(name, method.lrs, study.seeds[: method.seeds], steps, per_step, make)
    for run in planned.grid:
        load_config(recipe, run.overrides)  # refused now rather than after hours
    return planned, config


def forwards_per_step(config: ZOConfig) -> int:
    """Forward passes of one micro-batch in a step, or what a step with gradients costs in them.

    Raises:
        ConfigError: the method takes no steps.
    """
    units = config.training.batch_size // config.training.micro_batch_size
    if config.method == "zeroth_order":
        return units * forwards(config.zeroth_order.estimator_spec)
    if config.method == "first_order":
        return units * FORWARDS_PER_UNIT
    raise ConfigError(
        f"method {config.method} takes no steps that a budget could count",
        where="method",
        remedy="compare zeroth_order and first_order; every run also reports the zero-shot score",
    )


def eval_every(steps: int, evaluations: int) -> int:
    """Steps between scores on the dev set, so that there are at most so many of them, the last step's included."""
    return -(-steps // evaluations)


def _pairs(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({name})" for name, value in values.items())
