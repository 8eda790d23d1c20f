"""A piece of a run's journal as one string of bytes: what is shared as a fine-tune, and what a late rank is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zo_ds.journal.binary import decode_segments, encode_header, encode_record
from zo_ds.journal.history import History, Stretch, assemble


def to_bytes(history: History, first: int, last: int, shared: Mapping[str, Any] | None = None) -> bytes:
    """Records of the steps first .. last - 1 as a journal of their own: no spare space, one segment for each fork.

    Args:
        history: where they are.
        first: step.
        last: step behind them.
        shared: see `Header`.

    Raises:
        CorruptRunError, ValueError: see `History.stretches`.
    """
    raw, chain, at = bytearray(), 0, first
    for number, stretch in enumerate(_merged(history.stretches(first, last))):
        header = stretch.header
        part, chain = encode_header(replace(header, segment=number, first_step=at, chain=chain, shared=shared))
        raw += part
        for record in stretch.records:
            part, chain = encode_record(record, header, chain)
            raw += part
        at += len(stretch.records)
    if not raw:
        raw += encode_header(replace(history.header, segment=0, first_step=first, chain=0, shared=shared))[0]
    return bytes(raw)


def from_bytes(raw: bytes, name: str) -> History:
    """The journal in a string of bytes.

    Raises:
        DamageError: it has no sound header.
    """
    return assemble(Path(name), [(segment, Path(name)) for segment in decode_segments(raw)])


def _merged(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Neighbours under the same constants become one."""
    merged: list[Stretch] = []
    for stretch in stretches:
        if merged and merged[-1].header.maths() == stretch.header.maths():
            merged[-1] = Stretch(merged[-1].header, merged[-1].records + stretch.records)
        else:
            merged.append(stretch)
    return merged
