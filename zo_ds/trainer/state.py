"""What a run has found out so far beside its weights: scores, forks, time. Kept atomically in RUN/state.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from zo_ds.errors import CorruptRunError
from zo_ds.evaluation.evaluate import Evaluation


@dataclass
class RunState:
    """Scores of a run and what its result needs of earlier lives.

    Attributes:
        data_sha256: of the training examples.
        zero_shot: score on the test set before the first step.
        dev: score on the dev set after so many steps.
        forks: where the mathematics was changed on purpose: step, forwards until then, changes.
        seconds: of training and evaluation in earlier lives.
        starts: how often the run was started.
    """

    data_sha256: str
    zero_shot: Evaluation | None = None
    dev: dict[int, Evaluation] = field(default_factory=dict)
    forks: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    starts: int = 1

    def best(self, by: str) -> tuple[int, Evaluation | None]:
        """(step, score) of the best model on the dev set; the earlier one of equals."""
        found: tuple[int, Evaluation | None] = (0, None)
        for step in sorted(self.dev):
            if self.dev[step].better_than(found[1], by):
                found = (step, self.dev[step])
        return found

    def out_of_patience(self, patience: int | None, by: str) -> bool:
        """Whether so many scores on the dev set came after the best one; never if patience is None."""
        best, _ = self.best(by)
        return patience is not None and sum(step > best for step in self.dev) >= patience

    def forget_after(self, step: int) -> None:
        """Drop what belongs to steps that are going to be taken again."""
        self.dev = {at: score for at, score in self.dev.items() if at <= step}
        self.forks = [fork for fork in self.forks if fork["step"] <= step]

    def forwards(self, steps: int, per_step: int) -> int:
        """Forward passes of the first so many steps."""
        step, forwards = (self.forks[-1]["step"], self.forks[-1]["forwards"]) if self.forks else (0, 0)
        return int(forwards + (steps - step) * per_step)

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> RunState:
        """The state in a text.

        Raises:
            CorruptRunError: it is none.
        """
        try:
            tree = json.loads(text)
            zero_shot = Evaluation(**tree["zero_shot"]) if tree["zero_shot"] is not None else None
            dev = {int(step): Evaluation(**score) for step, score in tree["dev"].items()}
            return RunState(
                tree["data_sha256"], zero_shot, dev, tree["forks"], float(tree["seconds"]), int(tree["starts"])
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptRunError(
                "the run's state cannot be read",
                where=where,
                why=str(error),
                remedy="remove it: the run goes on from its journal, and scores are taken again",
            ) from error
