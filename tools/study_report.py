"""What a study found: every score as CSV, and per method what it reached and what that took, as JSON and as tables."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from study_plan import Planned, Study
from study_runs import Outcome, Point, choose

COLUMNS = ("method", "lr", "seed", "step", "forwards", "dev_loss", "dev_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: of the values.
        std: sample standard deviation (divisor n - 1); None for one value.
        values: by seed.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Mean and deviation of one or more values."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))

    def __str__(self) -> str:
        """As shown in tables."""
        return f"{self.mean:.4f}" + (f" ± {self.std:.4f}" if self.std is not None else "")


@dataclass(frozen=True)
class Summary:
    """What a method reached with its chosen learning rate. Forwards to a level are None where it was not reached.

    Attributes:
        method: by name.
        lr: chosen.
        at_edge: the chosen one is the least or the largest of the grid: a better one may lie outside.
        seeds: whose runs are in the figures.
        diverged: seeds whose runs are not.
        steps: of a run.
        forwards_per_step: evaluations of one micro-batch.
        forwards: of a run.
        dev_loss: at the end of the budget.
        dev_accuracy: at the end of the budget.
        test_accuracy: at the end of the budget.
        wall_s: of a run, while `jobs` of them shared the machine.
        points: scores on the dev set, mean over seeds.
        to_accuracy: forwards until the mean dev accuracy is at a level, by level.
        to_loss: forwards until the mean dev loss is at a level, by level.
        to_reference: forwards until the reference's final mean dev accuracy and loss, by score.
        ratio: those divided by the forwards of the reference's run.
    """

    method: str
    lr: float
    at_edge: bool
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    steps: int
    forwards_per_step: int
    forwards: int
    dev_loss: Spread
    dev_accuracy: Spread
    test_accuracy: Spread
    wall_s: Spread
    points: tuple[Point, ...]
    to_accuracy: Mapping[str, float | None]
    to_loss: Mapping[str, float | None]
    to_reference: Mapping[str, float | None]
    ratio: Mapping[str, float | None]


def crossing(forwards: Sequence[float], values: Sequence[float], level: float, *, rising: bool) -> float | None:
    """Where a curve first meets a level, linear between its points.

    Args:
        forwards: of the points, increasing.
        values: at the points.
        level: to meet.
        rising: the level is met from below (accuracy), else from above (loss).

    Returns:
        Forwards; those of the first point if it is there already, an upper bound then. None: never.
    """
    for index, (at, value) in enumerate(zip(forwards, values, strict=True)):
        if not (value >= level if rising else value <= level):
            continue
        if index == 0 or not math.isfinite(values[index - 1]):
            return at
        before, start = forwards[index - 1], values[index - 1]
        return before + (at - before) * (level - start) / (value - start)
    return None


def mean_points(outcomes: Sequence[Outcome]) -> tuple[Point, ...]:
    """Scores on the dev set, mean over runs that were scored at the same steps."""
    return tuple(
        Point(
            points[0].step,
            points[0].forwards,
            statistics.fmean(point.loss for point in points),
            statistics.fmean(point.accuracy for point in points),
        )
        for points in zip(*(outcome.points for outcome in outcomes), strict=True)
    )


def chosen_outcomes(planned: Planned, done: Mapping[str, Outcome]) -> list[Outcome] | None:
    """The runs of a method's chosen learning rate, by seed; None if some are missing or all of the grid diverged."""
    grid = [done.get(run.name) for run in planned.grid]
    finished = [outcome for outcome in grid if outcome is not None]
    lr = choose(finished) if len(finished) == len(grid) else None
    found = [done.get(run.name) for run in planned.chosen(lr)] if lr is not None else [None]
    outcomes = [outcome for outcome in found if outcome is not None]
    return outcomes if len(outcomes) == len(found) else None


def summarise(study: Study, methods: Sequence[Planned], done: Mapping[str, Outcome]) -> list[Summary]:
    """What every method whose runs are all finished reached.

    Args:
        study: levels and reference.
        methods: as planned.
        done: finished runs, by name.
    """
    reference = next(planned for planned in methods if planned.name == study.reference)
    runs = chosen_outcomes(reference, done) or []
    goal = [*mean_points([outcome for outcome in runs if outcome.result is not None])][-1:]
    found = []
    for planned in methods:
        outcomes = chosen_outcomes(planned, done)
        if outcomes is not None:
            found.append(_summary(study, planned, outcomes, goal[0] if goal else None))
    return found


def _summary(study: Study, planned: Planned, outcomes: Sequence[Outcome], goal: Point | None) -> Summary:
    whole = [(outcome, outcome.result) for outcome in outcomes if outcome.result is not None]
    points, last = mean_points([outcome for outcome, _ in whole]), [outcome.points[-1] for outcome, _ in whole]
    forwards = [float(point.forwards) for point in points]

    def to_accuracy(level: float) -> float | None:
        return crossing(forwards, [point.accuracy for point in points], level, rising=True)

    def to_loss(level: float) -> float | None:
        return crossing(forwards, [point.loss for point in points], level, rising=False)

    met = {} if goal is None else {"accuracy": to_accuracy(goal.accuracy), "loss": to_loss(goal.loss)}
    run = outcomes[0].run
    return Summary(
        method=planned.name,
        lr=run.lr,
        at_edge=run.lr in (min(planned.lrs), max(planned.lrs)),
        seeds=tuple(outcome.run.seed for outcome, _ in whole),
        diverged=tuple(outcome.run.seed for outcome in outcomes if outcome.result is None),
        steps=planned.steps,
        forwards_per_step=planned.forwards_per_step,
        forwards=run.forwards,
        dev_loss=Spread.of([point.loss for point in last]),
        dev_accuracy=Spread.of([point.accuracy for point in last]),
        test_accuracy=Spread.of([float(result["final_accuracy"]) for _, result in whole]),
        wall_s=Spread.of([float(result["wall_s"]) for _, result in whole]),
        points=points,
        to_accuracy={f"{level:g}": to_accuracy(level) for level in study.accuracies},
        to_loss={f"{level:g}": to_loss(level) for level in study.losses},
        to_reference=met,
        ratio={key: None if goal is None or at is None else at / goal.forwards for key, at in met.items()},
    )


def csv_text(methods: Sequence[Planned], done: Mapping[str, Outcome]) -> str:
    """A row for every score on the dev set of every finished run; the test accuracy stands in a run's last row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for outcome in _in_order(methods, done):
        run = outcome.run
        for point in outcome.points:
            last = outcome.result is not None and point.step == run.steps
            test = outcome.result["final_accuracy"] if outcome.result is not None and last else ""
            writer.writerow(
                (run.method, f"{run.lr:g}", run.seed, point.step, point.forwards, point.loss, point.accuracy, test)
            )
    return text.getvalue()


def _in_order(methods: Sequence[Planned], done: Mapping[str, Outcome]) -> list[Outcome]:
    place = {planned.name: index for index, planned in enumerate(methods)}
    return sorted(done.values(), key=lambda found: (place[found.run.method], found.run.lr, found.run.seed))


def grid_rows(methods: Sequence[Planned], done: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Every learning rate that was tried on the first seed, and what came of it; figures are None if it diverged."""
    rows = []
    for planned in methods:
        grid = [done[run.name] for run in planned.grid if run.name in done]
        lr = choose(grid) if len(grid) == len(planned.lrs) else None
        for outcome in grid:
            whole, last = outcome.result is not None, outcome.points[-1:]
            rows.append(
                {
                    "method": planned.name,
                    "lr": outcome.run.lr,
                    "seed": outcome.run.seed,
                    "final_dev_loss": last[0].loss if whole else None,
                    "final_dev_accuracy": last[0].accuracy if whole else None,
                    "test_accuracy": outcome.result["final_accuracy"] if outcome.result is not None else None,
                    "outcome": "chosen" if outcome.run.lr == lr else "" if whole else "diverged",
                }
            )
    return rows


def tree(
    study: Study, methods: Sequence[Planned], done: Mapping[str, Outcome], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What the JSON holds.

    Args:
        study: as read.
        methods: as planned.
        done: finished runs, by name.
        environment: machine, versions and commit of the report.
    """
    found = summarise(study, methods, done)
    return {
        "study": study.model_dump(mode="json"),
        "environment": dict(environment),
        "commits_of_runs": sorted({outcome.commit for outcome in done.values()}),
        "unfinished": [planned.name for planned in methods if planned.name not in {row.method for row in found}],
        "methods": [asdict(summary) for summary in found],
        "grid": grid_rows(methods, done),
    }


def tables(study: Study, methods: Sequence[Planned], done: Mapping[str, Outcome]) -> str:
    """The same for people, in Markdown that reads well as text."""
    found = summarise(study, methods, done)
    missing = [planned.name for planned in methods if planned.name not in {row.method for row in found}]
    parts = [
        f"After {study.budget} forwards, mean ± sample standard deviation over seeds\n\n" + _scores(found),
        "Forwards until the mean over seeds is there, linear between evaluations\n\n" + _reached(study, found),
        f"Learning rates, seed {study.seeds[0]}; chosen by the dev loss at the end\n\n" + _grid(methods, done),
    ]
    if missing:
        parts.append(f"Not finished, or diverged with every learning rate: {', '.join(missing)}")
    return "\n\n".join(parts)


def _scores(found: Sequence[Summary]) -> str:
    head = ["method", "lr", "steps", "forwards", "dev loss", "dev accuracy", "test accuracy", "s a run", "seeds"]
    rows = [
        [
            row.method,
            f"{row.lr:g}" + (" (edge of the grid)" if row.at_edge else ""),
            str(row.steps),
            str(row.forwards),
            str(row.dev_loss),
            str(row.dev_accuracy),
            str(row.test_accuracy),
            f"{row.wall_s.mean:.0f}",
            f"{len(row.seeds)}" + (f" ({len(row.diverged)} diverged)" if row.diverged else ""),
        ]
        for row in found
    ]
    return _markdown(head, rows)


def _reached(study: Study, found: Sequence[Summary]) -> str:
    levels = [f"accuracy {level:g}" for level in study.accuracies] + [f"loss {level:g}" for level in study.losses]
    last = [f"{study.reference}'s final {score}" for score in ("accuracy", "loss")]
    rows = []
    for row in found:
        # At the first score it may have been there for long.
        first = row.points[0].forwards
        reached = [*row.to_accuracy.values(), *row.to_loss.values()]
        cells = [_forwards(at, first) for at in reached]
        for score in ("accuracy", "loss"):
            at, ratio = row.to_reference.get(score), row.ratio.get(score)
            cells.append(_forwards(at, first) + (f" (x {ratio:.2f})" if ratio is not None else ""))
        rows.append([row.method, *cells])
    return _markdown(["method", *levels, *last], rows)


def _forwards(at: float | None, first: float) -> str:
    if at is None:
        return "not reached"
    return f"<= {at:.0f}" if at <= first else f"{at:.0f}"


def _grid(methods: Sequence[Planned], done: Mapping[str, Outcome]) -> str:
    head = ["method", "lr", "final dev loss", "final dev accuracy", "test accuracy", ""]
    figures = ("final_dev_loss", "final_dev_accuracy", "test_accuracy")
    rows = [
        [
            row["method"],
            f"{row['lr']:g}",
            *("-" if row[key] is None else f"{row[key]:.4f}" for key in figures),
            row["outcome"],
        ]
        for row in grid_rows(methods, done)
    ]
    return _markdown(head, rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
