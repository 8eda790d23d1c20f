"""Writing a journal: a folder of segments, one writer; a record is durable before its step is applied.

The newest segment is preallocated for the rest of the run, so that a disk that fills up cannot stop it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from zo_ds.errors import MachineError
from zo_ds.files import discard, make_folder, reserve, sync, sync_handle, write_all
from zo_ds.journal.binary import encode_header, encode_record, record_size
from zo_ds.journal.history import History, segment_name
from zo_ds.journal.records import Header, StepRecord

_SPARE_RECORDS = 1024
"""Space reserved at a time where the length of the run is not known."""


class Journal:
    """A journal open for appending; made by `create` or `reopen`.

    Args:
        folder: of the segments.
        header: of the newest segment.
        handle: of its file.
        at: where its next record belongs.
        chain: CRC at that place.
        next_step: that record's step.
        total_steps: of the run, None if that is not known.
        sync_every: records for each fsync; more than one is faster and risks the last few steps in a power cut
            (never in a crash of the process), which are then computed again.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        handle: int,
        at: int,
        chain: int,
        next_step: int,
        total_steps: int | None,
        sync_every: int,
    ) -> None:
        self.folder, self.header, self.next_step = folder, header, next_step
        self._handle, self._at, self._chain = handle, at, chain
        self._total, self._sync_every = total_steps, sync_every
        self._pending: list[bytes] = []
        self._rewrite = False
        self._reserved = at + _space(header, total_steps, next_step)

    @classmethod
    def create(cls, folder: Path, header: Header, total_steps: int | None = None, sync_every: int = 1) -> Journal:
        """Start a journal in a new or empty folder.

        Raises:
            MachineError: there is one already, or the disk refuses it; no half of it is left behind.
        """
        try:
            make_folder(folder)
            if any(folder.glob("*.zoj")):
                raise MachineError("there is a journal already", where=str(folder), remedy="choose another run_dir")
            handle, at, chain = _new_segment(folder, header, _space(header, total_steps))
        except OSError as error:
            raise _refused(error, folder, "start") from error
        return cls(folder, header, handle, at, chain, header.first_step, total_steps, sync_every)

    @classmethod
    def reopen(
        cls, folder: Path, history: History, start: int = 0, total_steps: int | None = None, sync_every: int = 1
    ) -> Journal:
        """Go on with a journal after the last step that follows ``start``; what is damaged behind it is moved aside.

        Args:
            folder: of the segments.
            history: as read from it.
            start: step of the weights that are at hand: 0, or that of a snapshot.
            total_steps: of the run, None if that is not known.
            sync_every: records for each fsync.

        Raises:
            MachineError: the disk refuses it; the journal says the same as before.
        """
        segment, file, later = history.continuation(start)
        end = segment.end_step
        try:
            for other in later:
                _quarantine(other)
            handle = os.open(file, os.O_RDWR)
            try:
                if segment.damage is not None:
                    _cut(handle, file, segment.sound, keep=not segment.torn)
                reserve(handle, segment.sound + _space(segment.header, total_steps, end))
                sync_handle(handle)
                sync(folder)
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            raise _refused(error, file, "continue") from error
        return cls(folder, segment.header, handle, segment.sound, segment.chain, end, total_steps, sync_every)

    @property
    def durable_steps(self) -> int:
        """Steps that a power cut cannot take back."""
        return self.next_step - len(self._pending)

    def append(self, record: StepRecord) -> None:
        """Write one record; it is durable when this returns (with ``sync_every`` 1).

        Raises:
            MachineError: the disk refused it. The weights must then stay as they are; the step may be tried again.
        """
        raw, chain = encode_record(record, self.header, self._chain)
        try:
            if self._at + len(raw) > self._reserved:
                reserve(self._handle, self._at + len(raw) * _SPARE_RECORDS)
                self._reserved = self._at + len(raw) * _SPARE_RECORDS
            if self._rewrite:
                # After a failed fsync nothing tells which earlier bytes are on the disk.
                earlier = b"".join(self._pending)
                write_all(self._handle, earlier + raw, self._at - len(earlier))
            else:
                write_all(self._handle, raw, self._at)
            if len(self._pending) + 1 >= self._sync_every:
                sync_handle(self._handle)
        except OSError as error:
            self._rewrite = True
            self._blank(len(raw))
            raise _refused(error, self.folder, "write") from error
        self._rewrite = False
        self._pending = [*self._pending, raw] if len(self._pending) + 1 < self._sync_every else []
        self._at, self._chain, self.next_step = self._at + len(raw), chain, record.step + 1

    def sync(self) -> None:
        """Make every record durable now.

        Raises:
            MachineError: the disk refused it.
        """
        try:
            if self._pending:
                earlier = b"".join(self._pending)
                write_all(self._handle, earlier, self._at - len(earlier))
                sync_handle(self._handle)
        except OSError as error:
            raise _refused(error, self.folder, "write") from error
        self._pending = []

    def rotate(self, header: Header | None = None) -> None:
        """Begin a new segment, from now on with the constants of another header if one is given.

        Raises:
            MachineError: the disk has no room for it; the old segment goes on.
        """
        self.sync()
        new = replace(
            header or self.header,
            run_id=self.header.run_id,
            segment=self.header.segment + 1,
            first_step=self.next_step,
            chain=self._chain,
        )
        try:
            handle, at, chain = _new_segment(self.folder, new, _space(new, self._total, self.next_step))
        except OSError as error:
            raise _refused(error, self.folder, "begin a segment of") from error
        old, end = self._handle, self._at
        self._handle, self.header, self._at, self._chain = handle, new, at, chain
        self._reserved = at + _space(new, self._total, self.next_step)
        self._trim(old, end)

    @property
    def position(self) -> tuple[int, int]:
        """(number of the newest segment, CRC where its next record belongs)."""
        return self.header.segment, self._chain

    def close(self) -> None:
        """Make everything durable, give back the space that was not used, and close the file.

        Raises:
            MachineError: the disk refused it.
        """
        try:
            self.sync()
        finally:
            self._trim(self._handle, self._at)

    def _blank(self, count: int) -> None:
        """A step that nobody applied should not be found; if it is, it is whole and replay takes it."""
        with suppress(OSError):
            write_all(self._handle, bytes(count), self._at)

    @staticmethod
    def _trim(handle: int, size: int) -> None:
        with suppress(OSError):  # zeros after the last record say nothing
            os.ftruncate(handle, size)
            sync_handle(handle)
        with suppress(OSError):
            os.close(handle)


def _space(header: Header, total_steps: int | None, first: int | None = None) -> int:
    start = header.first_step if first is None else first
    return record_size(header) * (_SPARE_RECORDS if total_steps is None else max(0, total_steps - start))


def _new_segment(folder: Path, header: Header, space: int) -> tuple[int, int, int]:
    """(handle, where records begin, chain) of a segment that is on disk, name and all."""
    raw, chain = encode_header(header)
    number = header.segment
    while (path := folder / segment_name(number)).exists():  # names do not matter, and nothing is written over
        number += 1
    temporary = path.with_suffix(".tmp")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(handle, raw, 0)
        reserve(handle, len(raw) + space)
        sync_handle(handle)
        os.replace(temporary, path)
        sync(folder)
    except BaseException:
        os.close(handle)
        discard(temporary)
        discard(path)
        raise
    return handle, len(raw), chain


def _cut(handle: int, file: Path, sound: int, keep: bool) -> None:
    """Blank what follows the sound part; a copy stays beside it if it may be more than half a record."""
    size = os.fstat(handle).st_size
    if keep:
        copy = file.with_suffix(f".{time.time_ns()}.damaged")
        target = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_all(target, os.pread(handle, size, 0), 0)
            sync_handle(target)
        finally:
            os.close(target)
        sync(file.parent)
    write_all(handle, bytes(size - sound), sound)


def _quarantine(file: Path) -> None:
    os.replace(file, file.with_suffix(f".{time.time_ns()}.damaged"))


def _refused(error: OSError, where: Path, what: str) -> MachineError:
    return MachineError(
        f"cannot {what} the journal: {error.strerror or error}",
        where=str(where),
        why="a step is only applied when its record is on disk",
        remedy="free some space or mend the disk; every earlier step is safe, the same command goes on from there",
    )
