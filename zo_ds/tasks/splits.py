"""Which examples are trained on, which choose the model, and which are reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

from zo_ds.config.schema import DataConfig
from zo_ds.data.examples import Example, Splits
from zo_ds.data.read import DataSource
from zo_ds.data.shuffle import salted, shuffled
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.task import Sizes, Task

log = logging.getLogger("zo_ds")

Item = TypeVar("Item")

HELD_OUT = 500
"""Most examples that are held out of the training rows for a split that has no file."""


def load_splits(config: DataConfig, task: Task) -> Splits:
    """All three splits of a task's data.

    `files`: each split is its file; a split without one is drawn from the training rows (a tenth, at most 500).
    `published`: the protocol of arXiv 2305.17333: train and dev are drawn from the training rows, test from the
    validation rows; a dev split without a size is as large as for `files`. With `shots`, train and dev have so many
    examples of each class (arXiv 2012.15723).

    Args:
        config: where the data is, and how much of it is used.
        task: reads rows.

    Raises:
        DataError: a file is missing, empty or malformed (with file and line), or the training rows miss a class.
        ConfigError: there are fewer examples than the recipe asks for.
    """
    source = DataSource(config)
    wanted = _sizes(config, task)
    train = _examples(source, "train", task)
    if train is None:
        raise source.missing("train")
    if config.shots is not None:
        splits = _few_shots(source, config, task, train, wanted)
    elif config.splits == "published" or (config.splits == "auto" and task.dev_from_train):
        train = _shuffled(train, config.seed, "train")
        held = wanted.dev or max(1, min(HELD_OUT, len(train) // 10))
        count = _enough(wanted.train, len(train) - held, "data.train_examples")
        dev = train[count : count + held]
        splits = Splits(train[:count], dev, _validation(source, config, task, wanted))
    else:
        splits = _of_files(source, config, task, train, wanted)
    _check_classes(splits, task, config)
    return splits


def _sizes(config: DataConfig, task: Task) -> Sizes:
    published = task.sizes if config.splits != "files" else Sizes()
    return Sizes(
        config.train_examples or published.train,
        config.dev_examples or published.dev,
        config.test_examples or published.test,
    )


def _examples(source: DataSource, split: str, task: Task) -> list[Example] | None:
    rows = source.rows(split)
    return None if rows is None else [example for row in rows for example in task.read(row)]


def _of_files(source: DataSource, config: DataConfig, task: Task, train: list[Example], wanted: Sizes) -> Splits:
    dev, test = _examples(source, "dev", task), _examples(source, "test", task)
    if dev is None or test is None:
        missing = [name for name, found in (("dev", dev), ("test", test)) if found is None]
        share = min(HELD_OUT, len(train) // 10)
        if not share:
            error = source.missing(missing[0])
            raise DataError(
                error.what,
                where=error.where,
                why=f"{error.why}; and {len(train)} training rows are too few to hold a tenth of them out",
                remedy=f"write {missing[0]}.jsonl, or give 10 training rows or more",
            )
        drawn = _shuffled(list(range(len(train))), config.seed, "held out")
        parts = [sorted(drawn[at * share : (at + 1) * share]) for at in range(len(missing))]
        log.info("%s", f"no file for {' and '.join(missing)}: {share} examples each are held out of the training rows")
        held = [[train[number] for number in part] for part in parts]
        out = {number for part in parts for number in part}
        train = [example for number, example in enumerate(train) if number not in out]
        dev = held.pop(0) if dev is None else dev
        test = held.pop(0) if test is None else test
    return Splits(train[: wanted.train], dev[: wanted.dev], test[: wanted.test])


def _few_shots(source: DataSource, config: DataConfig, task: Task, train: list[Example], wanted: Sizes) -> Splits:
    shots = config.shots or 0
    if not task.label_words:
        raise ConfigError(
            "shots are counted for each class, and this task has none",
            where=f"data.shots = {shots}",
            remedy="use data.train_examples and data.dev_examples",
        )
    drawn = _shuffled(train, config.seed, "shots")
    few: list[list[Example]] = [[], []]
    for label, word in enumerate(task.label_words):
        own = [example for example in drawn if example.label == label]
        if len(own) < 2 * shots:
            raise ConfigError(
                f"there are {len(own)} training examples of '{word}', {2 * shots} are needed",
                where=f"data.shots = {shots}",
                why="train and dev have so many of each class",
                remedy=f"set data.shots to {len(own) // 2} or less",
            )
        few[0] += own[:shots]
        few[1] += own[shots : 2 * shots]
    return Splits(few[0], few[1], _validation(source, config, task, wanted))


def _validation(source: DataSource, config: DataConfig, task: Task, wanted: Sizes) -> list[Example]:
    # The answers of many test splits on the hub are not public; the protocol then tests on the validation rows.
    first, second = ("dev", "test") if task.dev_from_train else ("test", "dev")
    found = _examples(source, first, task) or _examples(source, second, task)
    if found is None:
        raise source.missing(first)
    return _shuffled(found, config.seed, "test")[: wanted.test]


def _shuffled(items: Sequence[Item], seed: int, stream: str) -> list[Item]:
    salt = salted(seed, int.from_bytes(stream.encode()[:8], "little"))
    return [items[number] for number in shuffled(range(len(items)), salt)]


def _enough(wanted: int | None, there: int, where: str) -> int:
    if there < 1 or (wanted is not None and there < wanted):
        raise ConfigError(
            f"there are {max(there, 0)} training examples beside those that choose the model, {wanted or 1} are asked "
            "for",
            where=where,
            remedy="ask for fewer with data.train_examples and data.dev_examples, or data.splits=files",
        )
    return there if wanted is None else wanted


def _check_classes(splits: Splits, task: Task, config: DataConfig) -> None:
    seen = {example.label for example in splits.train}
    missing = [word for label, word in enumerate(task.label_words) if label not in seen]
    if missing:
        raise DataError(
            f"no training example has the label {', '.join(map(repr, missing))}",
            where=config.path,
            why=f"{len(splits.train)} rows, labels found: {sorted(seen)}; a classifier cannot learn a class it never "
            "sees",
            remedy="add examples, raise data.train_examples, or remove the word from task.label_words",
        )
