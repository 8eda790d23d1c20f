"""Rows and what is in them, with every complaint about one; batches as a pure function of (seed, step)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_ds.data.batches import POOL, BatchSampler
from zo_ds.data.examples import Example, Splits, examples_sha256
from zo_ds.data.rows import Row
from zo_ds.errors import ConfigError, DataError
from zo_ds.tasks.registry import reader

WORDS = ("terrible", "great")
WHERE = "train.jsonl:7"


def refused(line: str, ask: Callable[[Row], Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        ask(Row(json.loads(line), WHERE))
    assert caught.value.where == WHERE
    assert caught.value.exit_code == 3
    return caught.value


# Rows


@pytest.mark.parametrize(
    ("line", "part", "mention"),
    [
        ('{"label": 0, "sentence": "x"}', "remedy", "data.text_field"),
        ('{"label": 0, "sentence": "x"}', "why", "label, sentence"),
        ('{"text": "x", "stars": 5}', "remedy", "data.label_field"),
        ("{}", "why", "it has: "),
        ('{"text": "", "label": 0}', "what", "'text' is not a text"),
        ('{"text": " \\n", "label": 0}', "what", "'text' is not a text"),
        ('{"text": null, "label": 0}', "why", "None"),
        ('{"text": ["x"], "label": 0}', "why", "['x']"),
        ('{"text": "half a pair \\ud83c", "label": 0}', "what", "'text' is not a text"),
        ('{"text": "x", "label": 2}', "why", "0..1"),
        ('{"text": "x", "label": -1}', "what", "-1"),
        ('{"text": "x", "label": -1}', "why", "use another split"),
        ('{"text": "x", "label": 1.0}', "what", "1.0"),
        ('{"text": "x", "label": "1"}', "what", "'1'"),
        ('{"text": "x", "label": "Great"}', "why", "terrible, great"),
        ('{"text": "x", "label": null}', "what", "None"),
        ('{"text": "x", "label": [0]}', "what", "[0]"),
    ],
)
def test_a_bad_row_is_named(line: str, part: str, mention: str) -> None:
    assert mention in getattr(refused(line, reader("{text} It was", WORDS)), part)


def test_labels_by_word_by_number_and_as_truth() -> None:
    labels = ("great", "terrible", 1, 0, True, False)
    assert [Row({"y": label}, WHERE).label("y", WORDS) for label in labels] == [1, 0, 1, 0, 1, 0]
    assert Row({"y": 2}, WHERE).label("y", ("a", "b", "c")) == 2
    # Truth is one of two.
    assert "True" in refused('{"y": true}', lambda row: row.label("y", ("a", "b", "c"))).what


def test_a_dot_leads_into_an_object_or_belongs_to_a_name() -> None:
    row = Row({"answers": {"text": ["x"], "n": {"m": "deep"}}, "a.b": "whole", "a": {"b": "part"}}, WHERE)
    assert (row.texts("answers.text"), row.text("answers.n.m"), row.text("a.b")) == (("x",), "deep", "whole")
    assert "it has: text, n" in refused('{"answers": {"text": 1, "n": 2}}', lambda row: row.value("answers.m")).why
    assert "it has: list" in refused('{"answers": []}', lambda row: row.value("answers.text")).why


def test_has_means_that_there_is_something() -> None:
    row = Row({"none": None, "empty": ""}, WHERE)
    assert (row.has("none"), row.has("empty"), row.has("nothing")) == (False, True, False)


def test_a_text_may_be_empty_where_that_is_asked_for() -> None:
    assert Row({"prompt": ""}, WHERE).text("prompt", empty=True) == ""
    assert "'prompt'" in refused('{"prompt": 3}', lambda row: row.text("prompt", empty=True)).what


@pytest.mark.parametrize("line", ['{"x": []}', '{"x": "text"}', '{"x": null}', '{"x": ["a", 1]}', '{"x": ["\\ud800"]}'])
def test_what_is_no_list_of_texts(line: str) -> None:
    assert "'x'" in refused(line, lambda row: row.texts("x")).what


# Examples


def test_a_hash_of_examples_is_one_of_what_they_say() -> None:
    examples = [Example("a", 0, after=" It was", where="x:1"), Example("b", 1, messages=(("user", "x"),))]
    elsewhere = [Example("a", 0, after=" It was", where="y:9"), examples[1]]
    assert examples_sha256(examples) == examples_sha256(elsewhere)
    others = [
        examples[::-1],
        examples[:1],
        [Example("a", 1, after=" It was"), examples[1]],
        [Example("a", 0, after=" It is"), examples[1]],
        [examples[0], Example("b", 1, messages=(("user", "y"),))],
    ]
    assert len({examples_sha256(each) for each in [examples, *others]}) == 6


def test_a_prompt_and_all_splits() -> None:
    one, two, three = (Example(text, before="<", after=">") for text in "abc")
    assert one.prompt == "<a>"
    assert Splits([one], [two], [three]).all() == [one, two, three]


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
