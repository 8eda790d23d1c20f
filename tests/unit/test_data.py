"""Rows from JSON lines, with every complaint about them; batches as a pure function of (seed, step)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_ds.config.schema import DataConfig
from zo_ds.data.batches import POOL, BatchSampler
from zo_ds.data.examples import Example, load_splits
from zo_ds.errors import ConfigError, DataError

WORDS = ("terrible", "great")
ROWS: list[Any] = [{"text": "bad film", "label": 0}, {"text": "good film", "label": 1}, {"text": "dull", "label": 0}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "dev", "test"):
        write(tmp_path, split, ROWS)
    return tmp_path


def write(folder: Path, split: str, rows: list[Any]) -> None:
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def config(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(path=str(folder), **settings)


def refused(folder: Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load_splits(config(folder, **settings), WORDS)
    return caught.value


def test_rows_in_their_order(folder: Path) -> None:
    write(folder, "dev", ROWS[1:])
    splits = load_splits(config(folder), WORDS)
    assert splits.train == [Example("bad film", 0), Example("good film", 1), Example("dull", 0)]
    assert splits.dev == splits.train[1:]
    assert splits.test == splits.train


def test_labels_by_word_and_fields_by_name(folder: Path) -> None:
    rows = [{"sentence": "a", "y": "great", "other": 5}, {"sentence": "b", "y": "terrible"}, {"sentence": "c", "y": 1}]
    for split in ("train", "dev", "test"):
        write(folder, split, rows)
    splits = load_splits(config(folder, text_field="sentence", label_field="y"), WORDS)
    assert splits.train == [Example("a", 1), Example("b", 0), Example("c", 1)]


def test_limits_take_the_first_rows(folder: Path) -> None:
    splits = load_splits(config(folder, train_examples=2, dev_examples=1, test_examples=99), WORDS)
    assert [len(rows) for rows in (splits.train, splits.dev, splits.test)] == [2, 1, 3]
    assert splits.train == [Example("bad film", 0), Example("good film", 1)]


def test_a_limit_that_leaves_one_class_is_refused(folder: Path) -> None:
    error = refused(folder, train_examples=1)
    assert "'great'" in error.what
    assert "data.train_examples" in error.remedy


def test_blank_lines_count_as_lines_but_are_no_rows(folder: Path) -> None:
    good = "\n".join(map(json.dumps, ROWS))
    (folder / "train.jsonl").write_text(f"\n  \n{good}\n\n")
    assert len(load_splits(config(folder), WORDS).train) == 3
    (folder / "train.jsonl").write_text(f"\n  \n{good}\n\nnonsense\n")
    assert refused(folder).where.endswith("train.jsonl:7")


def test_windows_line_ends(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes("\r\n".join(map(json.dumps, ROWS)).encode())
    assert len(load_splits(config(folder), WORDS).train) == 3


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_of_unicode_may_stand_in_a_text(folder: Path, separator: str) -> None:
    """JSON lines end at a newline only; `ensure_ascii=False` writes these characters as they are."""
    row = {"text": f"one{separator}two", "label": 0}
    lines = [json.dumps(row, ensure_ascii=False), *map(json.dumps, ROWS)]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert load_splits(config(folder), WORDS).train[0] == Example(row["text"], 0)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_missing_and_empty_files(folder: Path, split: str) -> None:
    path = folder / f"{split}.jsonl"
    path.write_text("\n \n")
    error = refused(folder)
    assert (error.where, error.exit_code) == (str(path), 3)
    assert "empty" in error.what
    path.unlink()
    error = refused(folder)
    assert error.where == str(path)
    assert "No such file" in error.what


def test_missing_folder_names_the_setting(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere")
    assert error.where == f"data.path = {tmp_path / 'nowhere'}"
    (tmp_path / "file").write_text("x")
    assert "no such data folder" in refused(tmp_path / "file").what


def test_unknown_catalogue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="vader-movie"):
        load_splits(DataConfig(path="catalog:vader-movies"), WORDS)


def test_one_class(folder: Path) -> None:
    write(folder, "train", [ROWS[0], ROWS[2]])
    error = refused(folder)
    assert "'great'" in error.what
    assert "'terrible'" not in error.what
    assert "2 rows" in error.why


@pytest.mark.parametrize(
    ("line", "part", "mention"),
    [
        ("{'text': 1}", "what", "not JSON"),
        ('{"text": "cut off', "what", "not JSON"),
        ('{"label": 0, "sentence": "x"}', "remedy", "data.text_field"),
        ('{"label": 0, "sentence": "x"}', "why", "label, sentence"),
        ('{"text": "x", "stars": 5}', "remedy", "data.label_field"),
        ("[1, 2]", "why", "list"),
        ('"text and label"', "why", "str"),
        ("null", "why", "NoneType"),
        ('{"text": "", "label": 0}', "what", "'text' is not a text"),
        ('{"text": " \\n", "label": 0}', "what", "'text' is not a text"),
        ('{"text": null, "label": 0}', "why", "None"),
        ('{"text": ["x"], "label": 0}', "why", "['x']"),
        ('{"text": "x", "label": 2}', "why", "0..1"),
        ('{"text": "x", "label": -1}', "what", "-1"),
        ('{"text": "x", "label": true}', "what", "True"),
        ('{"text": "x", "label": 1.0}', "what", "1.0"),
        ('{"text": "x", "label": "1"}', "what", "'1'"),
        ('{"text": "x", "label": "Great"}', "why", "terrible, great"),
        ('{"text": "x", "label": null}', "what", "None"),
        ('{"text": "x", "label": [0]}', "what", "[0]"),
    ],
)
def test_a_bad_row_is_named_with_its_line(folder: Path, line: str, part: str, mention: str) -> None:
    path = folder / "dev.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    error = refused(folder)
    assert error.where == f"{path}:2"
    assert mention in getattr(error, part)


def test_not_utf8(folder: Path) -> None:
    path = folder / "test.jsonl"
    path.write_bytes('{"text": "caf\xe9", "label": 0}'.encode("latin-1"))
    error = refused(folder)
    assert error.where == str(path)
    assert "UTF-8" in error.remedy


# Batches


def classes_of(*sizes: int) -> list[int]:
    return [label for label, size in enumerate(sizes) for _ in range(size)]


def spread_lengths(count: int) -> list[int]:
    return [(index * 37) % 53 + 1 for index in range(count)]


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=3),
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
)
@settings(max_examples=50)
def test_a_batch_is_a_function_of_seed_and_step(
    sizes: list[int], share: int, seed: int, grouped: bool, steps: list[int]
) -> None:
    labels = classes_of(*sizes)
    lengths = spread_lengths(len(labels)) if grouped else None

    def new() -> BatchSampler:
        return BatchSampler(labels, share * len(sizes), seed, balanced=True, lengths=lengths)

    used = new()
    assert [used.indices(step) for step in steps] == [new().indices(step) for step in steps]
    assert [used.indices(step) for step in reversed(steps)] == [new().indices(step) for step in reversed(steps)]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(1, 4), st.booleans(), st.integers(0, 40))
@settings(max_examples=50)
def test_shares_are_equal_in_every_batch_and_micro_batch(
    sizes: list[int], share: int, grouped: bool, step: int
) -> None:
    """A class of any size fills its share, if need be with the same example again."""
    labels, turn = classes_of(*sizes), len(sizes)
    lengths = spread_lengths(len(labels)) if grouped else None
    drawn = BatchSampler(labels, share * turn, 5, balanced=True, lengths=lengths).indices(step)
    assert len(drawn) == share * turn
    for micro in (turn * size for size in range(1, share + 1) if share % size == 0):
        for start in range(0, len(drawn), micro):
            counts = Counter(labels[index] for index in drawn[start : start + micro])
            assert counts == dict.fromkeys(range(turn), micro // turn)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_every_example_once_an_epoch(batch_size: int, batches: int, seed: int, epoch: int) -> None:
    sampler = BatchSampler(classes_of(batch_size * batches), batch_size, seed, balanced=False)
    drawn = [index for step in range(batches) for index in sampler.indices(epoch * batches + step)]
    assert sorted(drawn) == list(range(batch_size * batches))


def test_epochs_and_seeds_have_different_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return BatchSampler(classes_of(64), 64, seed, balanced=False).indices(epoch)

    orders = [order(seed, epoch) for seed in (-1, 0, 1, 2) for epoch in range(3)]
    assert all(sorted(found) == list(range(64)) for found in orders)
    assert len({tuple(found) for found in orders}) == len(orders)


def test_classes_are_shuffled_apart_from_each_other() -> None:
    drawn = BatchSampler(classes_of(32, 32), 64, 0, balanced=True).indices(0)
    assert [index for index in drawn if index < 32] != [index - 32 for index in drawn if index >= 32]


def test_a_small_class_starts_again() -> None:
    sampler = BatchSampler(classes_of(2, 40), 10, 0, balanced=True)
    rare = [index for step in range(4) for index in sampler.indices(step) if index < 2]
    assert Counter(rare) == {0: 10, 1: 10}
    assert all({0, 1} <= set(sampler.indices(step)) for step in range(4))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.booleans(), st.integers(0, 3))
@settings(max_examples=50)
def test_grouping_draws_the_same_examples(first: int, second: int, share: int, balanced: bool, block: int) -> None:
    labels = classes_of(first, second)
    steps = range(block * POOL, (block + 1) * POOL)

    def draws(lengths: list[int] | None) -> Counter[int]:
        sampler = BatchSampler(labels, 2 * share, 11, balanced=balanced, lengths=lengths)
        return Counter(index for step in steps for index in sampler.indices(step))

    assert draws(spread_lengths(len(labels))) == draws(None)


@pytest.mark.parametrize("balanced", [True, False])
def test_grouping_wastes_less_on_padding(balanced: bool) -> None:
    labels = [index % 2 for index in range(400)]
    lengths = spread_lengths(len(labels))

    def waste(batches: Callable[[int], list[int]]) -> int:
        rows = [[lengths[index] for index in batches(step)] for step in range(2 * POOL)]
        return sum(max(row) * len(row) - sum(row) for row in rows)

    grouped = BatchSampler(labels, 8, 0, balanced=balanced, lengths=lengths)
    plain = BatchSampler(labels, 8, 0, balanced=balanced)
    assert waste(grouped.indices) < waste(plain.indices) / 4
    # Long and short batches take turns at random, not from short to long.
    mean = [sum(lengths[index] for index in grouped.indices(step)) for step in range(POOL)]
    assert mean not in (sorted(mean), sorted(mean, reverse=True))


@pytest.mark.parametrize(("classes", "batch"), [(2, 3), (3, 8), (3, 2)])
def test_a_batch_that_cannot_be_balanced(classes: int, batch: int) -> None:
    labels = classes_of(*[4] * classes)
    with pytest.raises(ConfigError, match=f"a multiple of {classes}") as caught:
        BatchSampler(labels, batch, 0, balanced=True)
    assert caught.value.where == "training.batch_size"
    assert len(BatchSampler(labels, batch, 0, balanced=False).indices(7)) == batch
