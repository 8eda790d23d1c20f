"""Which examples are trained on, choose the model and are reported: files, the published protocol, so many a class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from zo_ds.config.schema import DataConfig, TaskConfig
from zo_ds.data.examples import Example, Splits
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.registry import resolve_task
from zo_ds.tasks.splits import HELD_OUT, load_splits
from zo_ds.tasks.task import Task

ROWS: list[dict[str, Any]] = [
    {"text": "bad film", "label": 0},
    {"text": "good film", "label": 1},
    {"text": "dull", "label": 0},
]
MOVIES, SST2, MASKED = (resolve_task(TaskConfig(name=name)) for name in ("movie-sentiment", "sst2", "sst2-masked"))
SST5, COPA = (resolve_task(TaskConfig(name=name)) for name in ("sst5-masked", "copa"))


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def rows(count: int, name: str = "t", classes: int = 2, column: str = "sentence") -> list[dict[str, Any]]:
    return [{column: f"{name} {number}", "label": number % classes} for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.jsonl", ROWS)
    return tmp_path


def load(path: Path, task: Task = MOVIES, **settings: Any) -> Splits:
    return load_splits(DataConfig(path=str(path), **settings), task)


def texts(examples: Sequence[Example]) -> list[str]:
    return [example.text.strip() for example in examples]


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.dev), len(splits.test)


def numbers(examples: Sequence[Example], name: str = "t") -> list[int]:
    """Which of the rows that `rows` made they are."""
    assert all(text.split()[0] == name for text in texts(examples))
    return [int(text.split()[1]) for text in texts(examples)]


# Files


def test_rows_in_their_order(folder: Path) -> None:
    write(folder / "dev.jsonl", ROWS[1:])
    splits = load(folder)
    found = [(example.text, example.label) for example in splits.train]
    assert found == [("bad film", 0), ("good film", 1), ("dull", 0)]
    assert [example.where for example in splits.train] == [f"{folder / 'train.jsonl'}:{n}" for n in (1, 2, 3)]
    assert texts(splits.dev) == texts(splits.train)[1:]
    assert texts(splits.test) == texts(splits.train)


def test_labels_by_word_and_fields_by_name(folder: Path) -> None:
    given = [{"sentence": "a", "y": "great", "other": 5}, {"sentence": "b", "y": "terrible"}, {"sentence": "c", "y": 1}]
    for split in ("train", "dev", "test"):
        write(folder / f"{split}.jsonl", given)
    data = DataConfig(path=str(folder), text_field="sentence", label_field="y")
    splits = load_splits(data, resolve_task(TaskConfig(name="movie-sentiment"), data))
    assert [(example.text, example.label) for example in splits.train] == [("a", 1), ("b", 0), ("c", 1)]


def test_limits_take_the_first_rows(folder: Path) -> None:
    splits = load(folder, train_examples=2, dev_examples=1, test_examples=99)
    assert sizes(splits) == (2, 1, 3)
    assert texts(splits.train) == ["bad film", "good film"]


def test_a_limit_that_leaves_one_class_is_refused(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(folder, train_examples=1)
    assert "'great'" in caught.value.what
    assert "data.train_examples" in caught.value.remedy


def test_one_class(folder: Path) -> None:
    write(folder / "train.jsonl", [ROWS[0], ROWS[2]])
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "'great'" in caught.value.what
    assert "'terrible'" not in caught.value.what
    assert "2 rows" in caught.value.why


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_bad_row_of_any_split_is_named(folder: Path, split: str) -> None:
    path = folder / f"{split}.jsonl"
    write(path, [ROWS[0], {"text": "x", "label": 2}])
    with pytest.raises(DataError, match="label 2") as caught:
        load(folder)
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_missing_and_empty_files(folder: Path, split: str) -> None:
    path = folder / f"{split}.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        load(folder)
    path.unlink()
    # Three rows are too few to hold any out.
    with pytest.raises(DataError, match="no such file") as caught:
        load(folder)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("missing", [("dev",), ("test",), ("dev", "test")])
@pytest.mark.parametrize("count", [10, 47, 10 * HELD_OUT + 30])
def test_splits_without_a_file_are_held_out_of_the_training_rows(
    tmp_path: Path, missing: tuple[str, ...], count: int
) -> None:
    write(tmp_path / "train.jsonl", rows(count, column="text"))
    for split in {"dev", "test"} - set(missing):
        write(tmp_path / f"{split}.jsonl", rows(4, split, column="text"))
    share = min(HELD_OUT, count // 10)
    splits = load(tmp_path)
    parts = {"dev": splits.dev, "test": splits.test}
    held = [number for split in missing for number in numbers(parts[split])]
    assert [len(parts[split]) for split in missing] == [share] * len(missing)
    assert [texts(parts[split])[0].split()[0] for split in parts if split not in missing] == [
        split for split in parts if split not in missing
    ]
    assert sorted([*held, *numbers(splits.train)]) == list(range(count))
    assert numbers(splits.train) == sorted(numbers(splits.train))
    assert load(tmp_path) == splits
    if share > 3:
        assert numbers(getattr(load(tmp_path, seed=1), missing[0])) != numbers(parts[missing[0]])


def test_limits_of_what_was_held_out(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", rows(60, column="text"))
    whole, few = load(tmp_path / "mine.jsonl"), load(tmp_path / "mine.jsonl", train_examples=9, dev_examples=2)
    assert (sizes(whole), sizes(few)) == ((48, 6, 6), (9, 2, 6))
    assert (few.train, few.dev, few.test) == (whole.train[:9], whole.dev[:2], whole.test)


def test_a_short_file_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", rows(9, column="text"))
    with pytest.raises(DataError, match="there is no dev split") as caught:
        load(tmp_path / "mine.jsonl")
    assert caught.value.where == str(tmp_path / "mine.jsonl")


def test_a_limit_of_the_recipe_goes_before_the_tasks_sizes_and_files_have_none(tmp_path: Path) -> None:
    for split, count in (("train", 1700), ("validation", 1100), ("test", 30)):
        write(tmp_path / f"{split}.jsonl", rows(count, split))
    assert sizes(load(tmp_path, SST2)) == (1000, 500, 1000)
    assert sizes(load(tmp_path, SST2, splits="published", dev_examples=7, test_examples=5)) == (1000, 7, 5)
    splits = load(tmp_path, SST2, splits="files")
    assert sizes(splits) == (1700, 1100, 30)
    assert numbers(splits.train, "train") == list(range(1700))


# The published protocol


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """As SST-2 is on the hub: test rows have no labels."""
    write(tmp_path / "train.jsonl", rows(200))
    write(tmp_path / "validation.jsonl", rows(40, "v"))
    write(tmp_path / "test.jsonl", [{"sentence": f"x {n}", "label": -1} for n in range(20)])
    return tmp_path


def test_train_and_dev_are_drawn_apart_and_test_is_the_validation_split(hub: Path) -> None:
    settings = {"train_examples": 50, "dev_examples": 20, "test_examples": 30}
    splits = load(hub, SST2, **settings)
    assert sizes(splits) == (50, 20, 30)
    assert not set(numbers(splits.train)) & set(numbers(splits.dev))
    assert len(set(numbers(splits.train))) == 50
    assert len(set(numbers(splits.test, "v"))) == 30
    assert numbers(splits.train) != sorted(numbers(splits.train))
    assert load(hub, SST2, **settings) == splits
    other = load(hub, SST2, **settings, seed=1)
    for name, own in (("train", "t"), ("dev", "t"), ("test", "v")):
        assert set(numbers(getattr(other, name), own)) != set(numbers(getattr(splits, name), own))


def test_more_of_one_split_is_more_of_the_same_draw(hub: Path) -> None:
    few, more = (load(hub, SST2, train_examples=50, dev_examples=20, test_examples=n) for n in (10, 30))
    assert numbers(more.test, "v")[:10] == numbers(few.test, "v")
    assert (few.train, few.dev) == (more.train, more.dev)


def test_what_is_left_is_all_there_is(tmp_path: Path) -> None:
    """COPA: 100 for dev, the rest of its 400 rows to train on, all validation rows to test."""
    row = {"premise": "p.", "question": "cause", "choice1": "a", "choice2": "b", "label": 0}
    write(tmp_path / "train.jsonl", [{**row, "premise": f"t {n}."} for n in range(400)])
    write(tmp_path / "validation.jsonl", [{**row, "premise": f"v {n}."} for n in range(100)])
    splits = load(tmp_path, COPA)
    assert sizes(splits) == (300, 100, 100)
    assert sorted(numbers([*splits.train, *splits.dev])) == list(range(400))


def test_a_task_without_sizes_has_a_dev_split_too(hub: Path) -> None:
    splits = load(hub, MASKED)
    assert sizes(splits) == (180, 20, 40)
    assert sorted(numbers([*splits.train, *splits.dev])) == list(range(200))
    assert sizes(load(hub, MASKED, train_examples=30)) == (30, 20, 40)


@pytest.mark.parametrize("settings", [{}, {"train_examples": 190, "dev_examples": 20}, {"dev_examples": 200}])
def test_fewer_rows_than_the_protocol_draws(hub: Path, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="beside those that choose the model") as caught:
        load(hub, SST2, **settings)
    assert caught.value.where == "data.train_examples"
    assert "data.splits=files" in caught.value.remedy


def test_a_task_of_ones_own_may_follow_the_protocol(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(100, column="text"))
    write(tmp_path / "dev.jsonl", rows(30, "v", column="text"))
    splits = load(tmp_path, MOVIES, splits="published", train_examples=40, dev_examples=10)
    assert sizes(splits) == (40, 10, 30)
    # A test split with answers goes before the validation split.
    write(tmp_path / "test.jsonl", rows(12, "x", column="text"))
    splits = load(tmp_path, MOVIES, splits="published", train_examples=40, dev_examples=10)
    assert sorted(numbers(splits.test, "x")) == list(range(12))


def test_nothing_to_test_on(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(100))
    for settings in ({"shots": 3}, {"train_examples": 5, "dev_examples": 5}):
        with pytest.raises(DataError, match="there is no dev split"):
            load(tmp_path, SST2, **settings)


# So many of each class


@pytest.mark.parametrize(("task", "classes", "column"), [(MASKED, 2, "sentence"), (SST5, 5, "text")])
def test_so_many_of_each_class(tmp_path: Path, task: Task, classes: int, column: str) -> None:
    write(tmp_path / "train.jsonl", rows(200, classes=classes, column=column))
    for name in ("validation", "test"):
        write(tmp_path / f"{name}.jsonl", rows(20, name, classes=classes, column=column))
    splits = load(tmp_path, task, shots=8)
    for part in (splits.train, splits.dev):
        assert Counter(example.label for example in part) == dict.fromkeys(range(classes), 8)
    assert not set(numbers(splits.train)) & set(numbers(splits.dev))
    # The hub has answers to the test rows of SST-5, but not to those of SST-2.
    where = "validation" if task is MASKED else "test"
    assert sorted(numbers(splits.test, where)) == list(range(20))
    assert load(tmp_path, task, shots=8) == splits
    assert set(numbers(load(tmp_path, task, shots=8, seed=5).train)) != set(numbers(splits.train))
    assert len(load(tmp_path, task, shots=8, test_examples=6).test) == 6


def test_too_few_of_a_class(hub: Path) -> None:
    write(hub / "train.jsonl", [*rows(40), *({"sentence": f"n {n}", "label": 0} for n in range(30))])
    assert sizes(load(hub, MASKED, shots=10)) == (20, 20, 40)
    with pytest.raises(ConfigError, match="there are 20 training examples of 'great', 22 are needed") as caught:
        load(hub, MASKED, shots=11)
    assert caught.value.where == "data.shots = 11"
    assert "10 or less" in caught.value.remedy


def test_shots_of_a_task_without_classes(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"t {n}"} for n in range(50)])
    with pytest.raises(ConfigError, match="this task has none"):
        load(tmp_path, resolve_task(TaskConfig(name="text")), shots=2)


def test_texts_have_no_classes_to_miss(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"t {n}"} for n in range(50)])
    assert sizes(load(tmp_path, resolve_task(TaskConfig(name="text")))) == (40, 5, 5)
