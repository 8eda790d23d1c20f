"""The published tasks: rows in the hub's layout, and the prompts and answers that the publications give for them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.published import CASES, Case
from zo_ds.data.rows import Row
from zo_ds.errors import DataError
from zo_ds.tasks.library import PUBLISHED
from zo_ds.tasks.task import Metric, Objective, Sizes

WHERE = "train.jsonl:7"


NEEDS = {
    "sst2": ("sentence", "label"),
    "rte": ("premise", "hypothesis", "label"),
    "cb": ("premise", "hypothesis", "label"),
    "boolq": ("passage", "question", "label"),
    "wsc": ("text", "span1_text", "span2_text", "label"),
    "wic": ("word", "sentence1", "sentence2", "label"),
    "multirc": ("paragraph", "question", "answer", "label"),
    "copa": ("premise", "choice1", "choice2", "question", "label"),
    "record": ("passage", "query", "entities", "answers"),
    "squad": ("title", "context", "question", "answers"),
    "drop": ("passage", "question", "answers_spans"),
    "sst2-masked": ("sentence", "label"),
    "sst5-masked": ("text", "label"),
    "snli-masked": ("premise", "hypothesis", "label"),
    "mnli-masked": ("premise", "hypothesis", "label"),
    "rte-masked": ("sentence1", "sentence2", "label"),
    "trec-masked": ("text", "coarse_label"),
}
"""Columns without which a row says nothing."""

PROTOCOL = {
    "sst2": ("cross_entropy", "accuracy", (1000, 500, 1000), 0),
    "rte": ("cross_entropy", "accuracy", (1000, 500, 1000), 0),
    "cb": ("cross_entropy", "accuracy", (None, 100, 1000), 0),
    "boolq": ("cross_entropy", "accuracy", (1000, 500, 1000), 0),
    "wsc": ("cross_entropy", "accuracy", (None, 500, 1000), 0),
    "wic": ("cross_entropy", "accuracy", (1000, 500, 1000), 0),
    "multirc": ("cross_entropy", "accuracy", (1000, 500, 1000), 0),
    "copa": ("answer", "accuracy", (None, 100, 1000), 0),
    "record": ("answer", "accuracy", (1000, 500, 1000), 0),
    "squad": ("answer", "f1", (1000, 500, 1000), 50),
    "drop": ("answer", "f1", (1000, 500, 1000), 50),
    "sst2-masked": ("cross_entropy", "accuracy", (None, None, None), 0),
    "sst5-masked": ("cross_entropy", "accuracy", (None, None, None), 0),
    "snli-masked": ("cross_entropy", "accuracy", (None, None, None), 0),
    "mnli-masked": ("cross_entropy", "accuracy", (None, None, None), 0),
    "rte-masked": ("cross_entropy", "accuracy", (None, None, None), 0),
    "trec-masked": ("cross_entropy", "accuracy", (None, None, None), 0),
}
"""Objective, metric, (train, dev, test) and tokens generated, in the order of the tables."""


def read(task: str, row: dict[str, Any]) -> Any:
    return PUBLISHED[task].read(Row(row, WHERE))


def a_row(task: str, columns: tuple[str, ...] = ()) -> dict[str, Any]:
    """A row of a task that has all of some columns."""
    return next(dict(case.row) for case in CASES if case.task == task and case.row.keys() >= set(columns))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_rows_become_the_published_questions(case: Case) -> None:
    (example,) = read(case.task, case.row)
    assert f"{example.before}{example.text}{example.after}" == case.prompt
    assert (example.text, example.options, example.label) == (case.text, case.options, case.label)
    assert (example.answers, example.neutral, example.where) == (case.answers, case.neutral, WHERE)
    assert len(set(example.options)) == len(example.options)


def test_every_task_has_rows_here() -> None:
    counts = {name: sum(case.task == name for case in CASES) for name in PUBLISHED}
    assert min(counts.values()) >= 2
    assert set(PUBLISHED) == {case.task for case in CASES}


def test_sizes_and_metrics() -> None:
    assert list(PUBLISHED) == list(PROTOCOL)
    for name, (objective, metric, sizes, tokens) in PROTOCOL.items():
        task = PUBLISHED[name]
        assert task.name == name
        assert (task.objective, task.metric) == (Objective(objective), Metric(metric))
        assert (task.sizes, task.max_new_tokens) == (Sizes(*sizes), tokens)
        assert task.masked == name.endswith("-masked")
        # The hub's test rows of SST-5 and TREC have their answers.
        assert task.dev_from_train == (name not in ("sst5-masked", "trec-masked"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_label_words_are_the_options(case: Case) -> None:
    """A head has an output for each word, so words and options are in the same order."""
    words = PUBLISHED[case.task].label_words
    assert words == () or words == tuple(option.strip() for option in case.options)
    assert (words == ()) == (case.task in ("copa", "record", "squad", "drop"))


def test_answers_of_a_multirc_question_are_examples_of_their_own() -> None:
    rows = [case.row for case in CASES if case.task == "multirc"]
    found = [example for row in rows for example in read("multirc", row)]
    assert [(example.after.count('"Apples"'), example.label) for example in found] == [(1, 1), (0, 0)]


LABELLED = [(task, columns[-1]) for task, columns in NEEDS.items() if columns[-1].endswith("label")]


@pytest.mark.parametrize(("task", "column"), [pair for pair in LABELLED if pair[0] != "snli-masked"])
def test_rows_whose_answers_are_not_published(task: str, column: str) -> None:
    with pytest.raises(DataError, match="-1 marks rows whose answers are not published") as caught:
        read(task, {**a_row(task, NEEDS[task]), column: -1})
    assert caught.value.where == WHERE


def test_pairs_of_snli_on_which_annotators_did_not_agree() -> None:
    row = a_row("snli-masked")
    assert list(read("snli-masked", {**row, "label": -1})) == []
    with pytest.raises(DataError, match="label -2 is not"):
        read("snli-masked", {**row, "label": -2})


@pytest.mark.parametrize(("task", "column"), [(task, column) for task, columns in NEEDS.items() for column in columns])
@pytest.mark.parametrize("wrong", [None, 7.5, [1, "x"], {}])
def test_columns_that_are_missing_or_of_another_kind(task: str, column: str, wrong: Any) -> None:
    good = a_row(task, NEEDS[task])
    read(task, good)
    without = {key: value for key, value in good.items() if key != column}
    for bad in (without, {**good, column: wrong}):
        with pytest.raises(DataError) as caught:
            read(task, bad)
        assert caught.value.where == WHERE
    with pytest.raises(DataError, match=f"the row has no '{column}"):
        read(task, without)


@pytest.mark.parametrize(
    ("task", "change", "mention"),
    [
        ("copa", {"question": "why"}, "'cause' or 'effect'"),
        ("record", {"query": "Fans sang."}, "no @placeholder"),
        ("record", {"answers": ["Oslo", "Voss"]}, "'answers' has 'Voss'"),
        ("record", {"answers": []}, "'answers' is not a list of texts"),
        ("record", {"entities": "Oslo"}, "'entities' is not a list of texts"),
        ("squad", {"answers": {"text": [1822]}}, "'answers.text' holds something that is not a text"),
        ("squad", {"answers": {"text": []}}, "'answers.text' is not a list of texts"),
        ("squad", {"answers": ["1822"]}, "no 'answers.text'"),
        ("drop", {"answers_spans": {"spans": "5"}}, "'answers_spans.spans' is not a list of texts"),
        ("sst5-masked", {"label": 5}, "label 5 is not one"),
        ("trec-masked", {"coarse_label": "WHO"}, "ABBR, ENTY, DESC, HUM, LOC, NUM"),
        ("mnli-masked", {"premise": " \n"}, "'premise' is not a text"),
    ],
)
def test_rows_that_make_no_sense(task: str, change: dict[str, Any], mention: str) -> None:
    with pytest.raises(DataError) as caught:
        read(task, {**a_row(task), **change})
    assert mention in str(caught.value)
    assert caught.value.where == WHERE


def test_an_entity_that_is_named_twice_is_one_option() -> None:
    (example,) = read("record", {**a_row("record"), "entities": ["Bergen", "Bergen", "Oslo"]})
    assert (len(example.options), example.label) == (2, 1)


CUT = {
    "sst2": "two hours lost",
    "rte": "The bridge opened in 1932",
    "cb": "She thought that the shop was shut",
    "boolq": "Penguins swim but cannot fly",
    "wsc": "Ann thanked Mia because She had helped",
    "wic": "We sat on the bank",
    "multirc": "Tom bought two red apples",
    "copa": "The lamp went out",
    "record": "Oslo beat Bergen on Sunday",
    "squad": "The tower was built in 1822 by hand",
    "drop": "They scored 3 times, then twice",
    "sst2-masked": "two hours lost",
    "sst5-masked": "a marvel",
    "snli-masked": "A man plays the drums",
    "mnli-masked": "He paid the fare",
    "rte-masked": "The bridge opened in 1932",
    "trec-masked": "Who wrote the first dictionary",
}
"""What other words may stand for, in a row and in its prompt."""


@settings(max_examples=40, deadline=None)
@given(words=st.text(min_size=1).filter(lambda text: text == text.strip() != ""), task=st.sampled_from(list(CUT)))
def test_the_prompt_holds_the_text_as_it_is(words: str, task: str) -> None:
    case = next(case for case in CASES if case.task == task and CUT[task] in case.prompt)
    column = next(key for key, value in case.row.items() if isinstance(value, str) and CUT[task] in value)
    (example,) = read(task, {**case.row, column: case.row[column].replace(CUT[task], words)})
    assert example.before + example.text + example.after == case.prompt.replace(CUT[task], words)
    assert words in example.text
