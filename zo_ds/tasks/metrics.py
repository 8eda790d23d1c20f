"""Scores of generated answers: exact match and token F1, by the published rules of SQuAD and of DROP.

All scores of one answer are between 0 and 1; `as_percent` is how the tables print their mean.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

Answer: TypeAlias = str | tuple[str, ...]
"""A number, a date or a span as text; several spans as a tuple."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and without articles, one space between words (SQuAD v1.1 evaluation)."""
    return _without_articles(text.lower().translate(_WITHOUT_PUNCTUATION))


def squad_exact(prediction: str, accepted: Sequence[str]) -> float:
    """Whether a prediction equals one of the accepted answers after normalisation: 1 or 0.

    Args:
        prediction: generated text.
        accepted: answers; none means that the question has no answer, and the right prediction is empty.
    """
    found = squad_normalize(prediction)
    return float(any(found == squad_normalize(answer) for answer in accepted or ("",)))


def squad_f1(prediction: str, accepted: Sequence[str]) -> float:
    """Best token F1 over the accepted answers. Tokens are counted as often as they occur.

    This is what the published tables of zeroth-order methods give for SQuAD and for DROP: MeZO (arXiv 2305.17333)
    scores DROP by this rule over its accepted answers too, not by DROP's own, which is `drop_f1`.

    Where either text is empty after normalisation, F1 is whether both are (SQuAD v2 evaluation).

    Args:
        prediction: generated text.
        accepted: answers; none means that the question has no answer, and the right prediction is empty.
    """
    found = squad_normalize(prediction).split()
    return max(_token_f1(found, squad_normalize(answer).split()) for answer in accepted or ("",))


def drop_normalize(text: str) -> str:
    """DROP's normalisation: tokens end at spaces and hyphens, and numbers become floats.

    A token that Python's `float` takes as it is keeps its punctuation ("3.5"); from others it is removed, and what is
    a number then ("1,000", "$5") becomes one. Articles are removed and white space is squeezed, as in SQuAD's.
    """
    return " ".join(filter(None, map(_drop_token, re.split("[ -]", text))))


def drop_exact(prediction: Answer, annotators: Sequence[Answer]) -> float:
    """Whether a prediction has the same normalised spans, in any order, as an annotator's answer: 1 or 0.

    Official DROP evaluation (arXiv 1903.00161): the spans are compared as sets, and their number must be the same.

    Args:
        prediction: generated answer.
        annotators: an answer of each; those whose first span is blank do not count.
    """
    found = [drop_normalize(span) for span in _spans(prediction)]
    wanted = [[drop_normalize(span) for span in _spans(answer)] for answer in annotators if not _is_blank(answer)]
    return float(any(len(found) == len(spans) and set(found) == set(spans) for spans in wanted))


def drop_f1(prediction: Answer, annotators: Sequence[Answer]) -> float:
    """Best F1 over the annotators by the official DROP evaluation (arXiv 1903.00161), rounded to whole percents.

    Spans are bags of words in which a word counts once. Those of the prediction are put on those of the annotator one
    to one, so that the sum of their F1 is the largest; a pair scores 0 if the annotator's span has numbers and the
    other one none of them. The sum is divided by the larger number of spans.

    The published tables of zeroth-order methods do not use this for DROP, but `squad_f1`.

    Args:
        prediction: generated answer.
        annotators: an answer of each; those whose first span is blank do not count.
    """
    return max((_drop_pair(prediction, answer) for answer in annotators if not _is_blank(answer)), default=0.0)


def as_percent(scores: Sequence[float]) -> float:
    """The mean of scores as the evaluations print it: in percent, with two decimals.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("the mean of no scores is not defined")
    return round(100 * math.fsum(scores) / len(scores), 2)


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _token_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _spans(answer: Answer) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else answer or ("",)


def _is_blank(answer: Answer) -> bool:
    return not _spans(answer)[0].strip()


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _drop_token(token: str) -> str:
    token = token.lower()
    if not _is_number(token):
        token = token.translate(_WITHOUT_PUNCTUATION)
    return _without_articles(str(float(token)) if _is_number(token) else token)


def _drop_pair(prediction: Answer, answer: Answer) -> float:
    found, wanted = ([set(drop_normalize(span).split()) for span in _spans(one)] for one in (prediction, answer))
    total = _best_total([[_bag_f1(bag, gold) for bag in found] for gold in wanted])
    # As numpy rounds to two decimals, and so the published numbers; Python's own rounding differs in rare cases.
    return round(100 * (total / max(len(found), len(wanted)))) / 100


def _bag_f1(found: set[str], wanted: set[str]) -> float:
    numbers = set(filter(_is_number, wanted))
    if numbers and not numbers & found:
        return 0.0
    if not found or not wanted:
        return float(found == wanted)
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def _best_total(scores: list[list[float]]) -> float:
    """The largest sum of entries of a matrix of which no two share a row or a column.

    Rows are placed one by one. A row may push others to their next best column as long as that pays; prices on columns
    keep every search short (the Hungarian method in Dijkstra's form). Cubic in the number of spans.
    """
    if len(scores) > len(scores[0]):
        scores = [list(column) for column in zip(*scores, strict=True)]
    count = len(scores[0])
    holder: list[int | None] = [None] * count
    of_row, of_column = [0.0] * len(scores), [0.0] * count
    for start in range(len(scores)):
        distance, before = [math.inf] * count, [-1] * count
        reached: list[int] = []
        row, length, last = start, 0.0, -1
        while True:
            for column in set(range(count)).difference(reached):
                along = length - scores[row][column] - of_row[row] - of_column[column]
                if along < distance[column]:
                    distance[column], before[column] = along, last
            last = min(set(range(count)).difference(reached), key=distance.__getitem__)
            length = distance[last]
            reached.append(last)
            occupant = holder[last]
            if occupant is None:
                break
            row = occupant
        of_row[start] += length
        for column in reached[:-1]:
            occupant = holder[column]
            assert occupant is not None
            of_row[occupant] += length - distance[column]
            of_column[column] -= length - distance[column]
        while before[last] >= 0:
            holder[last], last = holder[before[last]], before[last]
        holder[last] = start
    return math.fsum(scores[row][column] for column, row in enumerate(holder) if row is not None)
