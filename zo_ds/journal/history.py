"""Reading a journal: which steps it holds without a gap, and what is damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from zo_ds.errors import CorruptRunError, DataError
from zo_ds.journal.binary import DamageError, Segment, decode_segments
from zo_ds.journal.records import Header, StepRecord
from zo_ds.maths.estimators import SkipReason


def segment_name(number: int) -> str:
    """File of a segment in a journal's folder."""
    return f"{number:06d}.zoj"


@dataclass(frozen=True)
class Stretch:
    """Records under the constants of one header."""

    header: Header
    records: tuple[StepRecord, ...]


@dataclass(frozen=True)
class History:
    """A journal as read.

    Attributes:
        path: folder or file.
        segments: those with a sound header, in order.
        files: theirs; all the same if the journal is one file.
        problems: what is damaged, each with file and step, in words.
        unreadable: files without a sound header, or of another run.
    """

    path: Path
    segments: tuple[Segment, ...]
    files: tuple[Path, ...]
    problems: tuple[str, ...] = ()
    unreadable: tuple[Path, ...] = ()

    @property
    def header(self) -> Header:
        """Of the first segment."""
        return self.segments[0].header

    @property
    def steps(self) -> int:
        """Steps that are known from the base weights on, without a gap."""
        return self.end_of(0) or 0

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it, apart from a last record that was being written."""
        return not self.problems or (len(self.problems) == 1 and self.segments[-1].torn)

    def end_of(self, step: int) -> int | None:
        """First step that is missing if one starts at the weights before ``step``; None if there is no such place."""
        return max((piece[-1].end_step for piece in self._pieces() if _holds(piece, step)), default=None)

    def stretches(self, first: int, last: int) -> list[Stretch]:
        """Records of the steps first .. last - 1.

        Raises:
            CorruptRunError: one of them is damaged or missing.
            ValueError: the journal is shorter.
        """
        furthest = max(segment.end_step for segment in self.segments)
        if last > furthest or not 0 <= first <= last:
            raise ValueError(f"the journal has {furthest} steps, asked for {first} to {last}")
        end = self.end_of(first)
        if end is None or end < last:
            raise self.damage(first if end is None else end)
        found: list[Stretch] = []
        for segment in self._piece(first):
            start = segment.header.first_step
            records = segment.records[max(0, first - start) : max(0, last - start)]
            if records:
                found.append(Stretch(segment.header, records))
        return found

    def records(self, first: int = 0, last: int | None = None) -> list[StepRecord]:
        """Records of the steps first .. last - 1, by default all that follow the base weights without a gap.

        Raises:
            CorruptRunError, ValueError: see `stretches`.
        """
        last = self.steps if last is None else last
        return [record for stretch in self.stretches(first, last) for record in stretch.records]

    def skips_before(self, step: int) -> list[SkipReason]:
        """Why the steps just before one were skipped, the last one last; empty if the last was taken."""
        known = {record.step: record for segment in self.segments for record in segment.records if record.step < step}
        skips: list[SkipReason] = []
        while (record := known.get(step - 1 - len(skips))) is not None and record.skip is not None:
            skips.insert(0, record.skip)
        return skips

    def before_the_end(self, step: int, count: int, maths: Mapping[str, Any]) -> tuple[list[StepRecord], bool]:
        """The last records of those that continue the weights before ``step``, back to where the mathematics changed.

        Args:
            step: where one starts.
            count: as many at most.
            maths: theirs, as `Header.maths` gives it.

        Returns:
            (records in order, False if there are fewer because the journal is damaged).
        """
        piece = self._piece(step)
        same = list(takewhile(lambda segment: segment.header.maths() == maths, reversed(piece)))
        records = [record for segment in reversed(same) for record in segment.records]
        found = records[max(0, len(records) - count) :]
        return found, len(found) == count or len(same) < len(piece) or piece[0].header.first_step == 0

    def damage(self, step: int) -> CorruptRunError:
        """What to tell somebody who needs a step that cannot be read."""
        return CorruptRunError(
            f"the journal cannot be read at step {step}",
            where=str(self.path),
            why="; ".join(self.problems) or "segments are missing",
            remedy="restore the file from a copy; `zo_ds train` with the same command goes on from what is sound",
        )

    def continuation(self, step: int) -> tuple[Segment, Path, list[Path]]:
        """Where to write on if one starts at the weights before ``step``: segment, its file, files that must go."""
        piece = self._piece(step)
        number = next(n for n, segment in enumerate(self.segments) if segment is piece[-1])
        file = self.files[number]
        later = [*self.files[number + 1 :], *(other for other in self.unreadable if other.name > file.name)]
        return piece[-1], file, later

    def _piece(self, step: int) -> list[Segment]:
        """Of those that hold a step, the one that reaches furthest."""
        end = self.end_of(step)
        return next(piece for piece in self._pieces() if _holds(piece, step) and piece[-1].end_step == end)

    def _pieces(self) -> list[list[Segment]]:
        """Runs of segments that continue each other; where two continue the same one, each gives a run."""
        pieces: list[list[Segment]] = []
        for segment in self.segments:
            before = next((p[: n + 1] for p in pieces for n, s in enumerate(p) if follows(s, segment)), [])
            pieces = [p for p in pieces if p != before] if before else pieces
            pieces.append([*before, segment])
        return pieces


def follows(before: Segment, after: Segment) -> bool:
    """Whether a segment begins exactly where another one ended."""
    return (
        after.header.segment == before.header.segment + 1
        and after.header.first_step == before.end_step
        and after.header.chain == before.chain
        and after.header.run_id == before.header.run_id
    )


def _holds(piece: Sequence[Segment], step: int) -> bool:
    return piece[0].header.first_step <= step <= piece[-1].end_step


def assemble(
    path: Path, found: Sequence[tuple[Segment, Path]], problems: Sequence[str] = (), unreadable: Sequence[Path] = ()
) -> History:
    """Put segments in order, and say what is wrong with them.

    Args:
        path: of the whole journal.
        found: each segment with its file, one or more. What a file is called does not matter, its header does.
        problems: what is known to be damaged besides.
        unreadable: files that gave no segment.
    """
    ordered = sorted(found, key=lambda item: (item[0].header.segment, item[0].header.first_step))
    run = ordered[0][0].header.run_id
    segments = [segment for segment, _ in ordered if segment.header.run_id == run]
    files = [file for segment, file in ordered if segment.header.run_id == run]
    foreign = [file for segment, file in ordered if segment.header.run_id != run]
    notes = [*problems, *(f"{file}: it belongs to another run" for file in foreign)]
    notes += [f"{f}: {s.damage}" for s, f in zip(segments, files, strict=True) if s.damage is not None]
    gaps = [n for n in range(1, len(segments)) if not follows(segments[n - 1], segments[n])]
    notes += [f"{files[n]}: does not continue the segment before it" for n in gaps]
    if segments[0].header.segment != 0:
        notes.append(f"{files[0]}: the segments before it are missing")
    return History(path, tuple(segments), tuple(files), tuple(notes), (*unreadable, *foreign))


def read_journal(path: Path) -> History:
    """Read and check a journal: a run's folder of segments, or one file of them.

    Raises:
        DataError: there is none.
        CorruptRunError: no segment of it can be read.
    """
    files = sorted(path.glob("*.zoj")) if path.is_dir() else [path]
    found: list[tuple[Segment, Path]] = []
    problems: list[str] = []
    unreadable: list[Path] = []
    if not files or not files[0].exists():
        why = "No such file or directory" if not path.is_dir() else "the folder has no segments"
        raise DataError(f"no journal: {why}", where=str(path), remedy=_REMEDY)
    for file in files:
        try:
            found += [(segment, file) for segment in decode_segments(file.read_bytes())]
        except (DamageError, OSError) as error:
            problems.append(f"{file}: {getattr(error, 'strerror', None) or error}")
            unreadable.append(file)
    if not found:
        raise CorruptRunError(
            "the journal is damaged",
            where=str(path),
            why="; ".join(problems),
            remedy="restore the file from a copy, or start a new run (resume=never)",
        )
    return assemble(path, found, problems, unreadable)


_REMEDY = "give the directory of a run, e.g. runs/NAME, or a journal file"
