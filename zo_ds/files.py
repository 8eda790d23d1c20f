"""Writing files that matter: complete or not there at all, and durable when a call returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make names created in or removed from a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
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
    sync_folder(path.parent)


def write_folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder: filled under a temporary name, every file synced, then renamed into place.

    Args:
        path: the folder; an older one under this name is removed only after the new one is complete.
        fill: writes the files into the (existing, empty) folder it is given.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    for leftover in (temporary, retired):
        remove_folder(leftover)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        sync_folder(temporary)
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        sync_folder(path.parent)
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
