"""Files that matter: complete or not there at all, and durable when a call returns.

Everything goes through functions of `os` that take one step each, so that tests can let every one of them fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def sync_handle(handle: int) -> None:
    """Call fsync on an open file, however often a signal interrupts it."""
    while True:
        try:
            os.fsync(handle)
            return
        except InterruptedError:
            continue


def write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write bytes at a place in an open file, however short the single writes are."""
    left = memoryview(data)
    while len(left):
        try:
            written = os.pwrite(handle, left, offset)
        except InterruptedError:
            continue
        left, offset = left[written:], offset + written


def read_all(handle: int, into: memoryview, offset: int) -> None:
    """Fill a buffer from a place in an open file, however short the single reads are.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    while len(into):
        try:
            got = os.preadv(handle, [into], offset)
        except InterruptedError:
            continue
        if not got:
            raise OSError(errno.EIO, "the file is cut off")
        into, offset = into[got:], offset + got


def reserve(handle: int, size: int) -> None:
    """Make an open file at least so long, with disk space behind every byte of it."""
    while True:
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except InterruptedError:
            continue


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file: temporary name, fsync, rename, fsync of the folder. Readers see the old or the new file.

    One writer at a time.
    """
    # A fixed name, so that what a killed process left is written over.
    temporary = path.with_name(f".{path.name}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(handle, raw, 0)
            sync_handle(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise
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
            sync(file)
        sync(temporary)
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        discard(temporary)
        discard(retired)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and their names durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def discard(path: Path) -> None:
    """Remove a file or folder that nobody needs; what cannot be removed stays and does no harm."""
    with suppress(OSError):
        remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if path.is_symlink():
        path.unlink()
    if not path.is_dir():
        return
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    path.rmdir()
