"""Rows from a folder in the hub's own layout (JSON lines, parquet), from one file, from the hub, or the catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zo_ds.config.schema import DataConfig
from zo_ds.data.catalog import dataset_dir
from zo_ds.data.rows import Row
from zo_ds.errors import ConfigError, DataError

NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val", "validation_matched"),
    "test": ("test",),
}
"""What a split is called, in the order of preference."""
ENDINGS = (".jsonl", ".json", ".parquet")


class DataSource:
    """Where rows come from.

    Args:
        config: `path`, `subset` and `revision` say where.

    Raises:
        DataError: there is nothing.
        ConfigError, MachineError: the catalogue does not know the name, or the package cannot be fetched.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._place = data_place(config.path)

    def rows(self, split: str) -> list[Row] | None:
        """The rows of a split; None if there is no such split.

        Args:
            split: train, dev or test.

        Raises:
            DataError: a file cannot be read (with file and line), or is empty.
        """
        if self._place is None:
            return self._from_hub(split)
        whole = self._place.is_file()
        files = self._files(split) if not whole else [self._place] if split == "train" else []
        rows = [row for file in files for row in _read(file)]
        if files and not rows:
            raise DataError("the data file is empty", where=str(files[0]), remedy="put at least one example into it")
        return rows or None

    def missing(self, split: str) -> DataError:
        """What to say where a split is needed and not there."""
        file = None if self._place is None or self._place.is_file() else self._place / f"{split}.jsonl"
        return DataError(
            f"there is no {split} split{': no such file' if file else ''}",
            where=str(file or self._config.path),
            why=f"looked for {', '.join(NAMES[split])} with {', '.join(ENDINGS)}, also in parts (train-00000-of-00001) "
            "and in data/",
            remedy='write one JSON object on each line, e.g. {"text": "...", "label": 0}, in UTF-8',
        )

    def _files(self, split: str) -> list[Path]:
        assert self._place is not None
        subset = self._config.subset
        roots = [self._place / subset] if subset else [self._place, self._place / "data"]
        if subset and not roots[0].is_dir():
            raise DataError(
                "there is no such subset of the data",
                where=f"data.subset = {subset}",
                why=f"{self._place} holds: {', '.join(sorted(p.name for p in self._place.iterdir() if p.is_dir()))}",
                remedy="name one of its folders, or leave data.subset away",
            )
        for root in roots:
            for name in NAMES[split]:
                for ending in ENDINGS:
                    whole = root / f"{name}{ending}"
                    found = [whole] if whole.is_file() else sorted(root.glob(f"{name}-*{ending}"))
                    if found:
                        return found
        return []

    def _from_hub(self, split: str) -> list[Row] | None:
        import datasets

        path, subset = self._config.path, self._config.subset
        try:
            parts = datasets.load_dataset(path, subset, revision=self._config.revision)
        except Exception as error:  # its errors have no common base
            raise DataError(
                "cannot load the data set from the hub",
                where=f"data.path = {path}" + (f", data.subset = {subset}" if subset else ""),
                why=_first_line(error),
                remedy="hub data sets need a network or a filled cache; a folder in the same layout works offline",
            ) from error
        for name in NAMES[split]:
            if name in parts:
                return [Row(values, f"{path}:{name}:row {n}") for n, values in enumerate(parts[name], start=1)]
        return None


def data_place(path: str) -> Path | None:
    """The folder or file that `data.path` means, None for a hub name; `catalog:` data is prepared on first use.

    Raises:
        DataError: there is no such folder.
        ConfigError, MachineError: the catalogue does not know the name, or the package cannot be fetched.
    """
    kind, sign, name = path.partition(":")
    if sign and kind == "catalog":
        return dataset_dir(name)
    try:
        place = Path(path).expanduser()
        there, whole = place.exists(), place.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that is not known
        raise _no_folder(path) from error
    if whole and place.suffix not in ENDINGS:
        raise ConfigError(
            f"data cannot be read from a '{place.suffix}' file",
            where=f"data.path = {path}",
            why=f"known: {', '.join(ENDINGS)}",
            remedy="write it as JSON lines (.jsonl), one object on each line",
        )
    if there:
        return place
    looks_local = place.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or place.suffix in ENDINGS
    if looks_local or not path.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise _no_folder(path)
    return None


def _no_folder(path: str) -> DataError:
    return DataError(
        "there is no such data folder",
        where=f"data.path = {path}",
        remedy="give a folder with train.jsonl, dev.jsonl and test.jsonl, one JSONL file, a hub name, or catalog:NAME",
    )


def _read(path: Path) -> list[Row]:
    return list(_parquet(path) if path.suffix == ".parquet" else _json(path))


def _json(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the data: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            remedy='write one JSON object on each line, e.g. {"text": "...", "label": 0}, in UTF-8',
        ) from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        for number, values in enumerate(_parsed(text, str(path)), start=1):
            yield _row(values, f"{path}:row {number}")
        return
    # Not splitlines(), which also splits at separators that JSON texts may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _row(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where, remedy="write one JSON object on each line") from error


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            "a row is a JSON object",
            where=where,
            why=f"found {type(values).__name__}",
            remedy='write {"text": "...", "label": 0}, or the keys of your task (docs/tasks.md)',
        )
    return Row(values, where)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Sequence[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            "cannot read the parquet file", where=str(path), why=_first_line(error), remedy="download or write it again"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(values, f"{path}:row {number}")
