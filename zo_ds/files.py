"""Writing files that matter: complete or not there at all, and durable when a call returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file: temporary name, fsync, rename, fsync of the folder. Readers see the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder: filled under a temporary name, every file synced, then renamed into place.

    Args:
        path: the folder, with one writer at a time; an older one is removed only after the new one is in place.
        fill: writes the files into the (existing, empty) folder it is given.
    """
    # Fixed names, so that what a killed process left is found: its half-filled folder, or the only whole one.
    temporary = path.with_name(f".{path.name}.tmp")
    retired = path.with_name(f".{path.name}.old")
    if retired.exists() and not path.exists():
        os.replace(retired, path)
    for leftover in (temporary, retired):
        remove_folder(leftover)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        sync(temporary)
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        remove_folder(temporary)
        remove_folder(retired)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if path.is_symlink():
        path.unlink()
    if not path.is_dir():
        return
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    path.rmdir()
