"""Labelled text from JSON lines: read, checked, split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_ds.config.schema import DataConfig
from zo_ds.data.catalog import dataset_dir
from zo_ds.errors import DataError


@dataclass(frozen=True)
class Example:
    """A text and its class, counted from 0."""

    text: str
    label: int


@dataclass(frozen=True)
class Splits:
    """train: steps are drawn from it; dev: chooses the best model; test: reported, never chosen by."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


def data_folder(path: str) -> Path:
    """The folder that `data.path` means; a `catalog:` data set is fetched and prepared on first use.

    Raises:
        DataError: there is no such folder.
        ConfigError, MachineError: the catalogue does not know the name, or the package cannot be fetched.
    """
    kind, sign, name = path.partition(":")
    if sign and kind == "catalog":
        return dataset_dir(name)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            "there is no such data folder",
            where=f"data.path = {path}",
            remedy="give a folder with train.jsonl, dev.jsonl and test.jsonl, or catalog:NAME",
        )
    return folder


def load_splits(config: DataConfig, label_words: Sequence[str]) -> Splits:
    """All three splits.

    Args:
        config: where they are and how rows are named.
        label_words: one for each class; a label may be given as its number or as its word.

    Raises:
        DataError: a file is missing, empty, malformed (with file and line), or the training rows miss a class.
    """
    folder = data_folder(config.path)
    limits = {"train": config.train_examples, "dev": config.dev_examples, "test": config.test_examples}
    train, dev, test = (
        _read(folder / f"{split}.jsonl", config, label_words)[: limits[split]] for split in ("train", "dev", "test")
    )
    seen = {example.label for example in train}
    missing = [word for label, word in enumerate(label_words) if label not in seen]
    if missing:
        raise DataError(
            f"no training example has the label {', '.join(map(repr, missing))}",
            where=str(folder / "train.jsonl"),
            why=f"{len(train)} rows, labels found: {sorted(seen)}; a classifier cannot learn a class it never sees",
            remedy="add examples, raise data.train_examples, or remove the word from task.label_words",
        )
    return Splits(train, dev, test)


def _read(path: Path, config: DataConfig, label_words: Sequence[str]) -> list[Example]:
    try:
        # Not splitlines(), which also splits at separators that JSON texts may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the data: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            remedy='write one JSON object on each line, e.g. {"text": "...", "label": 0}, in UTF-8',
        ) from error
    examples = [
        _example(line, f"{path}:{number}", config, label_words)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise DataError("the data file is empty", where=str(path), remedy="put at least one example into it")
    return examples


def _example(line: str, where: str, config: DataConfig, label_words: Sequence[str]) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=where, remedy="write one JSON object on each line") from error
    for key, setting in ((config.text_field, "data.text_field"), (config.label_field, "data.label_field")):
        if not isinstance(row, dict) or key not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"the row has no '{key}'", where=where, why=f"it has: {found}", remedy=f"set {setting}")
    text, label = row[config.text_field], row[config.label_field]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"'{config.text_field}' is not a text", where=where, why=f"found {text!r}")
    return Example(text, _label(label, where, label_words))


def _label(value: Any, where: str, label_words: Sequence[str]) -> int:
    if isinstance(value, str) and value in label_words:
        return list(label_words).index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(label_words):
        return value
    raise DataError(
        f"the label {value!r} is not one of the task's",
        where=where,
        why=f"labels are 0..{len(label_words) - 1}, or the words {', '.join(label_words)}",
        remedy="correct the row or task.label_words",
    )
