"""The journal file: JSON lines, each with a CRC-32 chained over all lines before it, appended and fsynced.

A line that is incomplete or does not fit the chain ends the journal if it is the last one (a crash while writing);
anywhere else it is corruption.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zo_ds.errors import CorruptRunError, DataError, MachineError
from zo_ds.files import sync
from zo_ds.journal.records import Header, StepRecord


class Contents(NamedTuple):
    """A journal as read: header, records by step, and how many bytes of it are sound."""

    header: Header
    records: list[StepRecord]
    sound_bytes: int
    chain: int


class Journal:
    """A journal open for appending; one writer.

    Args:
        path: a new file.
        header: written as the first line.

    Raises:
        MachineError: the file exists or cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        self._chain = 0
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            raise MachineError(
                f"cannot start a journal: {error.strerror}", where=str(path), remedy="choose another run_dir"
            ) from error
        try:
            self._write(header.to_json())
        except MachineError:
            # An empty journal would make the directory look used.
            os.close(self._handle)
            path.unlink()
            raise
        sync(path.parent)

    def append(self, record: StepRecord) -> None:
        """Write one record; it is durable when this returns.

        Raises:
            MachineError: the disk refused it. The weights must then stay as they are.
        """
        self._write(record.to_json())

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _write(self, tree: Mapping[str, Any]) -> None:
        line, chain = _encode(tree, self._chain)
        start = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, start)
            raise MachineError(
                f"cannot write the journal: {error.strerror}",
                where=str(self._path),
                why="a step is only applied when its record is on disk",
                remedy="free some space; every earlier step is safe",
            ) from error
        self._chain = chain


def _encode(tree: Mapping[str, Any], chain: int) -> tuple[bytes, int]:
    body = json.dumps(tree, separators=(",", ":"), allow_nan=False)[:-1].encode()
    chain = zlib.crc32(body, chain)
    return body + f',"crc":"{chain:08x}"}}\n'.encode(), chain


def _decode(line: bytes, chain: int) -> tuple[dict[str, Any], int] | None:
    body, mark, tail = line.rpartition(b',"crc":"')
    chain = zlib.crc32(body, chain)
    if not mark or tail != f'{chain:08x}"}}'.encode():
        return None
    try:
        tree: dict[str, Any] = json.loads(body + b"}")
    except ValueError:
        return None
    return tree, chain


def read_journal(path: Path) -> Contents:
    """Read and check a journal.

    Raises:
        DataError: there is none.
        CorruptRunError: it is damaged before its last line, of an unknown version, or its steps have gaps.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"no journal: {error.strerror}", where=str(path), remedy="give the directory of a run, e.g. runs/NAME"
        ) from error
    lines = raw.split(b"\n")
    header: Header | None = None
    records: list[StepRecord] = []
    chain = sound = 0
    for number, line in enumerate(lines[:-1], start=1):
        decoded = _decode(line, chain)
        if decoded is None:
            # Two checksums in the last line are two records whose line break is damaged, not a torn one.
            if number == len(lines) - 1 and header is not None and line.count(b'"crc":"') < 2:
                break
            raise _corrupt(path, number, "its checksum does not continue the chain")
        try:
            if header is None:
                header = Header.from_json(decoded[0])
            else:
                record = StepRecord.from_json(decoded[0])
                if record.step != len(records):
                    raise ValueError(f"step {record.step} follows step {len(records) - 1}")
                records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(path, number, str(error)) from error
        chain, sound = decoded[1], sound + len(line) + 1
    if header is None:
        raise _corrupt(path, 1, "the header is incomplete")
    return Contents(header, records, sound, chain)


def _corrupt(path: Path, line: int, why: str) -> CorruptRunError:
    return CorruptRunError(
        "the journal is damaged",
        where=f"{path}:{line}",
        why=why,
        remedy="restore the file from a copy, or start a new run",
    )
