"""Files and folders are complete or not there at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from zo_ds.files import remove_folder, write_atomically, write_folder_atomically


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def fill_new(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "b").write_text("new b")
    (folder / "a").write_text("new a")


NEW = {"a": b"new a", "deep/er/b": b"new b"}


class FailingReplace:
    """os.replace that refuses its n-th call, as a full or broken disk would."""

    def __init__(self, at: int) -> None:
        self._left, self._real = at, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        self._left -= 1
        if self._left == 0:
            raise OSError(errno.EIO, "injected")
        self._real(source, target)


@pytest.mark.parametrize(("data", "raw"), [("grün\n", "grün\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write_makes_and_replaces(tmp_path: Path, data: bytes | str, raw: bytes) -> None:
    path = tmp_path / "file"
    write_atomically(path, data)
    assert path.read_bytes() == raw
    path.write_text("something longer than before")
    write_atomically(path, data)
    assert path.read_bytes() == raw
    assert os.listdir(tmp_path) == ["file"]


def test_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", FailingReplace(1))
    with pytest.raises(OSError, match="injected"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_into_a_missing_folder_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("older", [False, True])
def test_folder_is_made_or_replaced_as_a_whole(tmp_path: Path, older: bool) -> None:
    path = tmp_path / "model"
    if older:
        path.mkdir()
        (path / "stale").write_text("old")
    write_folder_atomically(path, fill_new)
    assert tree(path) == NEW
    assert os.listdir(tmp_path) == ["model"]


def test_folder_is_complete_before_it_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "stale").write_text("old")

    def fill(folder: Path) -> None:
        assert folder.parent == path.parent
        assert os.listdir(folder) == []
        assert tree(path) == {"stale": b"old"}
        fill_new(folder)

    write_folder_atomically(path, fill)
    assert tree(path) == NEW


@pytest.mark.parametrize("older", [False, True])
def test_failing_fill_keeps_the_old_folder(tmp_path: Path, older: bool) -> None:
    path = tmp_path / "model"
    if older:
        path.mkdir()
        (path / "kept").write_text("old")

    def fill(folder: Path) -> None:
        fill_new(folder)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_folder_atomically(path, fill)
    assert os.listdir(tmp_path) == (["model"] if older else [])
    assert not older or tree(path) == {"kept": b"old"}


@pytest.mark.parametrize("call", [1, 2])
def test_failing_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "kept").write_text("old")
    monkeypatch.setattr(os, "replace", FailingReplace(call))
    with pytest.raises(OSError, match="injected"):
        write_folder_atomically(path, fill_new)
    assert tree(path) == {"kept": b"old"}


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    for suffix in ("tmp", "old"):
        leftover = tmp_path / f".model.{suffix}"
        leftover.mkdir()
        (leftover / "half").write_text("x")
    write_folder_atomically(tmp_path / "model", fill_new)
    assert tree(tmp_path / "model") == NEW
    assert os.listdir(tmp_path) == ["model"]


def test_the_only_whole_folder_a_killed_process_left_comes_back(tmp_path: Path) -> None:
    retired = tmp_path / ".model.old"
    retired.mkdir()
    (retired / "kept").write_text("old")

    def fill(folder: Path) -> None:
        raise RuntimeError("again")

    with pytest.raises(RuntimeError, match="again"):
        write_folder_atomically(tmp_path / "model", fill)
    assert tree(tmp_path / "model") == {"kept": b"old"}
    assert os.listdir(tmp_path) == ["model"]


def test_remove_folder(tmp_path: Path) -> None:
    remove_folder(tmp_path / "missing")
    folder = tmp_path / "folder"
    folder.mkdir()
    fill_new(folder)
    (folder / "empty").mkdir()
    remove_folder(folder)
    assert os.listdir(tmp_path) == []


def test_links_are_removed_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    fill_new(outside)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "file").symlink_to(outside / "a")
    remove_folder(folder)
    assert not folder.exists()
    assert tree(outside) == NEW


def test_a_link_to_a_folder_is_replaced(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old").write_text("x")
    (tmp_path / "model").symlink_to(outside)
    write_folder_atomically(tmp_path / "model", fill_new)
    assert tree(tmp_path / "model") == NEW
    assert tree(outside) in ({"old": b"x"}, NEW)
    assert sorted(os.listdir(tmp_path)) == ["model", "outside"]
