"""Scores of generated answers, against values worked out by hand from the published rules."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_ds.tasks.metrics import (
    Answer,
    _best_total,
    as_percent,
    drop_exact,
    drop_f1,
    drop_normalize,
    squad_exact,
    squad_f1,
    squad_normalize,
)

WORDS = st.sampled_from(["the", "a", "Cat", "cat", "sat", "3", "3.0", "1,000", "five", "é", "re-run", "...", ""])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)
SPANS = st.lists(TEXTS, min_size=1, max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("a an the", ""),
        ("Theatre, another; than", "theatre another than"),
        ("  two \t spaces\nhere ", "two spaces here"),
        ("U.S.A.", "usa"),
        ("it's", "its"),
        ("the-end", "theend"),
        ("a.m.", "am"),
        ("A. Turing", "turing"),
        ("1,000", "1000"),
        ("3.5%", "35"),
        ("five", "five"),
        ("“quoted”", "“quoted”"),
        ("CAFÉ à la carte", "café à la carte"),
        ("an\u00a0apple", "apple"),
        ("", ""),
        ("!?", ""),
    ],
)
def test_squad_normalisation(text: str, normal: str) -> None:
    assert squad_normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "accepted", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the denver broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos Denver", ["Denver Broncos"], 0, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),
        ("the Denver Broncos team", ["Denver Broncos"], 0, 4 / 5),
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("Panthers", ["Denver Broncos", "Carolina Panthers", "Panthers"], 1, 1),
        ("Panthers of Carolina", ["Denver", "Carolina Panthers"], 0, 4 / 5),
        ("to be or not to be", ["to be"], 0, 2 * 2 / (6 + 2)),
        ("to to to", ["to be to"], 0, 2 / 3),
        ("1,000", ["1000"], 1, 1),
        ("1 000", ["1000"], 0, 0),
        ("five", ["5"], 0, 0),
        ("5.0", ["5"], 0, 0),
        ("$5", ["5"], 1, 1),
        ("March 4 1933", ["4 March 1933"], 0, 1),
        ("café", ["CAFÉ"], 1, 1),
        ("cafe", ["café"], 0, 0),
        ("naïve Bayes", ["Bayes"], 0, 2 / 3),
        ("東京 都", ["東京"], 0, 2 / 3),
        ("A", ["the"], 1, 1),
        ("", ["the"], 1, 1),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
        ("cat", [""], 0, 0),
        ("", [""], 1, 1),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat", "!"], 1, 1),
    ],
)
def test_squad(prediction: str, accepted: list[str], exact: float, f1: float) -> None:
    assert squad_exact(prediction, accepted) == exact
    assert squad_f1(prediction, accepted) == pytest.approx(f1, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("1,000", "1000.0"),
        ("1000", "1000.0"),
        ("3.5", "3.5"),
        ("3.50", "3.5"),
        # Not a number as it stands, so its point goes like any other.
        ("3.5%", "35.0"),
        ("$5", "5.0"),
        ("-5", "5.0"),
        ("five", "five"),
        ("twenty-five", "twenty five"),
        ("10-yard", "10.0 yard"),
        ("1e3", "1000.0"),
        ("5th", "5th"),
        ("1990s,", "1990s"),
        ("4 March 1933", "4.0 march 1933.0"),
        ("a", ""),
        ("an end-zone", "end zone"),
        ("U.S.", "us"),
        ("one\ttab", "one tab"),
        ("É 5", "é 5.0"),
        ("\uff15", "5.0"),
        ("", ""),
        (" - ", ""),
    ],
)
def test_drop_normalisation(text: str, normal: str) -> None:
    assert drop_normalize(text) == normal


@pytest.mark.parametrize(
    ("prediction", "annotators", "exact", "f1"),
    [
        ("3", ["3"], 1, 1),
        ("3.0", ["3"], 1, 1),
        ("1,000", ["1000"], 1, 1),
        ("five", ["5"], 0, 0),
        ("4", ["3"], 0, 0),
        ("3 yards", ["3"], 0, 0.67),
        # The annotator's number is missing, so shared words are worth nothing.
        ("4 yards", ["3 yards"], 0, 0),
        ("yards", ["3 yards"], 0, 0),
        # The rule looks at the annotator's numbers only.
        ("3 yards", ["yards"], 0, 0.67),
        ("10-yard", ["10 yard"], 1, 1),
        ("Tom Brady", ["Brady"], 0, 0.67),
        ("the Brady", ["Brady"], 1, 1),
        ("Brady Tom", ["Tom Brady"], 0, 1),
        # Bags: a word counts once.
        ("to be or not to be", ["to be"], 0, 0.67),
        ("4 March 1933", ["4 March 1933"], 1, 1),
        ("March 1933", ["4 March 1933"], 0, 0.8),
        ("4 March", ["5 April"], 0, 0),
        (("Brady", "Moss"), [("Moss", "Brady")], 1, 1),
        (("Brady",), [("Moss", "Brady")], 0, 0.5),
        ("Brady", [("Moss", "Brady")], 0, 0.5),
        (("Brady", "Moss", "Welker"), [("Brady", "Moss")], 0, 0.67),
        (("Tom Brady", "Moss"), [("Moss", "Brady")], 0, 0.83),
        # The equal spans together leave 0 for the others; crossed, both pairs have 2/3.
        (("x y", "x"), [("x y", "y")], 0, 0.67),
        (("x y", "z"), [("x", "x y")], 0, 0.5),
        (("w x", "x y"), [("x y z", "w x")], 0, 0.9),
        (("1", "2"), [("2", "3")], 0, 0.5),
        ("Brady", ["Moss", "Tom Brady", "Brady"], 1, 1),
        ("Brady", ["Moss", ("Tom", "Brady"), "Tom Brady"], 0, 0.67),
        ("", ["Brady"], 0, 0),
        ("", ["the"], 1, 1),
        ("Brady", ["the"], 0, 0),
        ("", [""], 0, 0),
        ("", ["  ", "Brady"], 0, 0),
        ("Brady", [("", "Brady"), "Brady"], 1, 1),
        ((), ["Brady"], 0, 0),
        ("Brady", [], 0, 0),
        ("Brady", [()], 0, 0),
        ("São Paulo", ["são paulo"], 1, 1),
        ("Sao Paulo", ["São Paulo"], 0, 0.5),
        # Sets of spans of the same number: equal, though not one to one.
        (("x", "y", "y"), [("x", "x", "y")], 1, 0.67),
    ],
)
def test_drop(prediction: Answer, annotators: list[Answer], exact: float, f1: float) -> None:
    assert drop_exact(prediction, annotators) == exact
    assert drop_f1(prediction, annotators) == f1


def test_best_pairing_is_not_the_greedy_one() -> None:
    assert _best_total([[0.9, 0.8], [0.8, 0.0]]) == pytest.approx(1.6)
    # In order 8/9 + 1/2, crossed 2/3 + 10/11.
    prediction, answer = ("p q r s", "p q r s t u"), ("p q r s t", "r s")
    assert drop_f1(prediction, [answer]) == round((10 / 11 + 2 / 3) / 2, 2)


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_the_pairing_is_the_best_of_all(rows: int, columns: int, data: st.DataObject) -> None:
    entry = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1.0])
    scores = [[data.draw(entry) for _ in range(columns)] for _ in range(rows)]
    wide = scores if rows <= columns else [list(column) for column in zip(*scores, strict=True)]
    every = permutations(range(len(wide[0])), len(wide))
    best = max(sum(row[column] for row, column in zip(wide, order, strict=True)) for order in every)
    assert _best_total(scores) == pytest.approx(best, abs=1e-12)


def test_many_spans_are_paired_quickly() -> None:
    spans = tuple(f"s{number}" for number in range(120))
    assert drop_f1(spans, [spans[::-1]]) == 1
    assert drop_f1(spans[:60], [spans]) == 0.5


@given(TEXTS, TEXTS)
def test_squad_f1_is_symmetric_and_bounded(one: str, other: str) -> None:
    score = squad_f1(one, [other])
    assert 0 <= score <= 1
    assert score == squad_f1(other, [one])
    if squad_exact(one, [other]):
        assert score == 1


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_the_best_accepted_answer_counts(prediction: str, accepted: list[str]) -> None:
    assert squad_f1(prediction, accepted) == max(squad_f1(prediction, [answer]) for answer in accepted)
    assert squad_exact(prediction, accepted) == max(squad_exact(prediction, [answer]) for answer in accepted)


@given(SPANS, SPANS)
def test_drop_f1_is_bounded_and_exact_answers_have_all_of_it(one: Answer, other: Answer) -> None:
    score = drop_f1(one, [other])
    assert 0 <= score <= 1
    assert score == round(score, 2)
    if drop_exact(one, [other]) and len(set(map(drop_normalize, one))) == len(one):
        assert score == 1


@given(SPANS, SPANS)
def test_drop_f1_without_numbers_is_symmetric(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    first, second = (tuple("x" + "".join(c for c in s if not c.isdigit()) for s in spans) for spans in (one, other))
    assert drop_f1(first, [second]) == drop_f1(second, [first])


@given(SPANS, st.randoms(use_true_random=False))
def test_the_order_of_spans_does_not_matter(spans: tuple[str, ...], order) -> None:
    shuffled = list(spans)
    order.shuffle(shuffled)
    blank_first = not spans[0].strip() or not shuffled[0].strip()
    assert drop_exact(spans, [tuple(shuffled)]) == (0 if not shuffled[0].strip() else 1)
    if not blank_first:
        assert drop_f1(spans, [tuple(shuffled)]) == 1


@given(TEXTS)
def test_normal_forms_stay(text: str) -> None:
    assert squad_normalize(squad_normalize(text)) == squad_normalize(text)
    assert drop_normalize(drop_normalize(text)) == drop_normalize(text)


def test_percent() -> None:
    assert as_percent([1, 0.5, 0]) == 50
    assert as_percent([1, 0, 0]) == 33.33
    assert as_percent([1.0]) == 100
    with pytest.raises(ValueError, match="no scores"):
        as_percent([])
