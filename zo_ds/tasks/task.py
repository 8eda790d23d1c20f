"""What a task is: how a row becomes examples, what is learned, what is measured, and how much data is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row


class Objective(str, Enum):
    """What a step lowers; every one is a loss of each example.

    Attributes:
        CROSS_ENTROPY: over the options.
        ANSWER: mean negative log-likelihood of the right answer's tokens.
        MARGIN: score of the best wrong option less that of the right one.
        ACCURACY: 1 where a wrong option is best, else 0; not differentiable.
        F1: 1 less the token F1 of a generated answer; not differentiable.
        REWARD: the negative of what the user's own function says of a generated answer.
    """

    CROSS_ENTROPY = "cross_entropy"
    ANSWER = "answer"
    MARGIN = "margin"
    ACCURACY = "accuracy"
    F1 = "f1"
    REWARD = "reward"


class Metric(str, Enum):
    """What is reported of a model.

    Attributes:
        ACCURACY: share of examples whose best option is the right one.
        F1: token F1 of generated answers (beside the exact match), 0..1.
        LOSS: the loss itself, where there is nothing to be right about.
        REWARD: mean of the user's own function of generated answers.
    """

    ACCURACY = "accuracy"
    F1 = "f1"
    LOSS = "loss"
    REWARD = "reward"


@dataclass(frozen=True)
class Sizes:
    """How many examples a published protocol draws; None: all there are."""

    train: int | None = None
    dev: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: in recipes.
        read: the examples of a row, mostly one; raises DataError with the row's place.
        label_words: the answer for each class; empty where each row brings its own options or none.
        template: the prompt as people read it.
        objective: what is learned if the recipe does not say so.
        metric: what is reported.
        hub: (data set, configuration) on the Hugging Face hub.
        sizes: what the published protocol draws.
        masked: asked through a mask rather than continued.
        max_new_tokens: of a generated answer; 0 where none is generated.
        dev_from_train: the published protocol draws dev from the training rows and tests on the validation rows,
            since the answers of the test rows are not public.
    """

    name: str
    read: Callable[[Row], Sequence[Example]]
    label_words: tuple[str, ...] = ()
    template: str = ""
    objective: Objective = Objective.CROSS_ENTROPY
    metric: Metric = Metric.ACCURACY
    hub: tuple[str, str | None] | None = None
    sizes: Sizes = Sizes()
    masked: bool = False
    max_new_tokens: int = 0
    dev_from_train: bool = False

    @property
    def classes(self) -> int:
        """Outputs of a classification head."""
        return len(self.label_words)


MEZO_SIZES = Sizes(1000, 500, 1000)
"""arXiv 2305.17333, section 3: examples to train on, to choose the best model by, and to report."""
