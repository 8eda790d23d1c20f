"""Rows from files in all the layouts of the hub, with file and line of what is wrong in them; and from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from zo_ds.config.schema import DataConfig
from zo_ds.data.read import DataSource, data_place
from zo_ds.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [{"text": f"film {number}", "label": number % 2} for number in range(4)]


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines(rows), encoding="utf-8")
    return path


def source(path: Path | str, **settings: Any) -> DataSource:
    return DataSource(DataConfig(path=str(path), **settings))


def values(found: DataSource, split: str = "train") -> list[Any] | None:
    rows = found.rows(split)
    return None if rows is None else [dict(row.values) for row in rows]


def refused(path: Path | str, split: str = "train", **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        source(path, **settings).rows(split)
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("below", ["", "data/"])
def test_a_file_for_each_split(tmp_path: Path, ending: str, below: str) -> None:
    for number, split in enumerate(("train", "dev", "test")):
        write(tmp_path / f"{below}{split}.{ending}", ROWS[number:])
    for number, split in enumerate(("train", "dev", "test")):
        assert values(source(tmp_path), split) == ROWS[number:]


@pytest.mark.parametrize("name", ["dev", "validation", "valid", "val", "validation_matched"])
@pytest.mark.parametrize("parts", [False, True])
def test_names_of_the_dev_split(tmp_path: Path, name: str, parts: bool) -> None:
    write(tmp_path / (f"{name}-00000-of-00001.parquet" if parts else f"{name}.jsonl"), ROWS)
    write(tmp_path / "validation_mismatched.jsonl", ROWS[:1])
    assert values(source(tmp_path), "dev") == ROWS
    assert values(source(tmp_path), "train") is None


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_parts_in_their_order(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"train-00001-of-00002.{ending}", ROWS[2:])
    write(tmp_path / f"train-00000-of-00002.{ending}", ROWS[:2])
    found = source(tmp_path).rows("train") or []
    assert [row.values for row in found] == ROWS
    assert [Path(row.where).name.partition(":")[0][:11] for row in found] == ["train-00000"] * 2 + ["train-00001"] * 2


def test_a_whole_file_goes_before_parts_and_the_folder_before_data(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", ROWS[:1])
    write(tmp_path / "train-00000-of-00001.jsonl", ROWS[:2])
    assert values(source(tmp_path)) == ROWS[:2]
    write(tmp_path / "train.jsonl", ROWS[:3])
    assert values(source(tmp_path)) == ROWS[:3]


def test_a_subset_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "boolq" / "train-00000-of-00001.parquet", ROWS)
    write(tmp_path / "cb" / "train.jsonl", ROWS[:1])
    assert values(source(tmp_path, subset="boolq")) == ROWS
    assert values(source(tmp_path, subset="cb")) == ROWS[:1]
    error = refused(tmp_path, subset="rte")
    assert error.where == "data.subset = rte"
    assert "boolq, cb" in error.why


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "mine.parquet"])
def test_one_file_is_the_training_split(tmp_path: Path, name: str) -> None:
    found = source(write(tmp_path / name, ROWS))
    assert values(found) == ROWS
    assert values(found, "dev") is None
    assert values(found, "test") is None


def test_every_row_knows_its_place(tmp_path: Path) -> None:
    expected = {"a.jsonl": "{}:2", "b.json": "{}:row 2", "c.parquet": "{}:row 2"}
    for name, where in expected.items():
        path = write(tmp_path / name, ROWS)
        assert (source(path).rows("train") or [])[1].where == where.format(path)


def test_json_lines_in_a_file_that_says_json(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(lines(ROWS))
    assert values(source(tmp_path)) == ROWS


# JSON lines


def test_blank_lines_count_as_lines_but_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"\n  \n{lines(ROWS)}\n")
    assert [row.where for row in source(tmp_path).rows("train") or []] == [f"{path}:{n}" for n in (3, 4, 5, 6)]
    path.write_text(f"\n  \n{lines(ROWS)}\n\nnonsense\n")
    assert refused(tmp_path).where == f"{path}:9"


@pytest.mark.parametrize(
    "written", [lines(ROWS).replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + lines(ROWS).encode()]
)
def test_what_windows_makes_of_a_file(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(written)
    assert values(source(tmp_path)) == ROWS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_of_unicode_may_stand_in_a_text(tmp_path: Path, separator: str) -> None:
    """JSON lines end at a newline only; `ensure_ascii=False` writes these characters as they are."""
    row = {"text": f"one{separator}two", "label": 0}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n" + lines(ROWS), encoding="utf-8")
    assert values(source(tmp_path)) == [row, *ROWS]


@pytest.mark.parametrize(
    ("line", "part", "mention"),
    [
        ("{'text': 1}", "what", "not JSON"),
        ('{"text": "cut off', "what", "not JSON"),
        ("[" * 100_000, "what", "not JSON"),
        ("[1, 2]", "why", "list"),
        ('"text and label"', "why", "str"),
        ("null", "why", "NoneType"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, part: str, mention: str) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    error = refused(tmp_path, "dev")
    assert error.where == f"{path}:2"
    assert mention in getattr(error, part)


def test_a_broken_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[{"text": "a"}, 5]')
    assert refused(tmp_path).where == f"{path}:row 2"
    path.write_text('[{"text": "a"}, ')
    assert (refused(tmp_path).where, refused(tmp_path).what[:8]) == (str(path), "not JSON")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes('{"text": "caf\xe9", "label": 0}'.encode("latin-1"))
    error = refused(tmp_path, "test")
    assert error.where == str(path)
    assert "UTF-8" in error.remedy


@pytest.mark.parametrize("content", [b"", b"nothing", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(content)
    error = refused(tmp_path)
    assert (error.where, error.what) == (str(path), "cannot read the parquet file")
    assert error.why


def test_what_parquet_holds(tmp_path: Path) -> None:
    """Nested columns are as in JSON, and what is missing is there as None."""
    rows = [{"answers": {"text": ["a", "b"], "start": [1, 2]}, "id": "x"}, {"answers": None, "id": None}]
    found = source(write(tmp_path / "train.parquet", rows)).rows("train") or []
    assert found[0].texts("answers.text") == ("a", "b")
    with pytest.raises(DataError, match=r"no 'answers\.text'") as caught:
        found[1].texts("answers.text")
    assert caught.value.where.endswith("train.parquet:row 2")


# What is not there


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_missing_and_empty_files(tmp_path: Path, split: str) -> None:
    path = tmp_path / f"{split}.jsonl"
    path.write_text("\n \n")
    error = refused(tmp_path, split)
    assert (error.what, error.where) == ("the data file is empty", str(path))
    path.unlink()
    assert source(tmp_path).rows(split) is None
    missing = source(tmp_path).missing(split)
    assert (missing.where, missing.exit_code) == (str(path), 3)
    assert "no such file" in missing.what


def test_one_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [])
    assert (refused(path).what, refused(path).where) == ("the data file is empty", str(path))
    assert source(path).missing("dev").where == str(path)


def test_places_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c", "mine.jsonl", "~nobody-of-that-name/x", "x y", "a" * 300):
        with pytest.raises(DataError, match="there is no such data folder") as caught:
            data_place(str(path))
        assert caught.value.where == f"data.path = {path}"
    (tmp_path / "table.csv").write_text("text,label\n")
    with pytest.raises(ConfigError, match=r"cannot be read from a '\.csv' file"):
        data_place("table.csv")
    assert data_place("owner/name") is None
    assert data_place("name") is None


def test_unknown_catalogue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="vader-movie"):
        source("catalog:vader-movies")


# The hub


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What HF_HUB_OFFLINE=1 sets, but these are read once for a process.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    error = refused("nobody/has-such-data", subset="part")
    assert error.what == "cannot load the data set from the hub"
    assert error.where == "data.path = nobody/has-such-data, data.subset = part"
    assert "nobody/has-such-data" in error.why
    assert "\n" not in error.why
    assert "network" in error.remedy


def test_splits_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the hub's own names of splits; only the download itself is left out."""
    asked = []

    def load(path: str, name: str | None, revision: str | None) -> Any:
        asked.append((path, name, revision))
        parts = {"train": ROWS, "validation": ROWS[:1], "unsupervised": ROWS[:2]}
        return datasets.DatasetDict({key: datasets.Dataset.from_list(rows) for key, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = source("owner/name", subset="part", revision="abc")
    assert [values(found, split) for split in ("train", "dev", "test")] == [ROWS, ROWS[:1], None]
    assert set(asked) == {("owner/name", "part", "abc")}
    assert [row.where for row in found.rows("dev") or []] == ["owner/name:validation:row 1"]
    assert found.missing("test").where == "owner/name"


def test_an_error_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refused("owner/name").why == "ConnectionError"
