"""The bytes of a journal segment, version 2: header, then records of one size, each with a CRC over all before it.

docs/formats.md has the layout byte by byte. Reading never gives a record that was not written: a record counts only
if the checksums continue to it.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

from zo_ds.journal.records import Header, StepRecord, terms_of
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.update import Update

JOURNAL_VERSION = 2
"""Version 1 was JSON lines, written by no release."""
MAGIC = b"ZODSJRNL"
_PREFIX = struct.Struct("<8sIIII")
_FIELDS = struct.Struct("<IHHdddQ")
_CRC = struct.Struct("<I")
_APPLIED, _HASHED, _SKIP_SHIFT = 1, 2, 8
_SKIPS = (None, SkipReason.NON_FINITE, SkipReason.ZERO_SPREAD, SkipReason.COEFFICIENT_CAP)
_MAX_HEADER = 1 << 28


class DamageError(ValueError):
    """Bytes that are not what was written."""


@dataclass(frozen=True)
class Segment:
    """A segment as read.

    Attributes:
        header: its own.
        records: those that are whole, in order.
        sound: bytes of header and whole records.
        chain: CRC at that place.
        begun: CRC of the header, which the first record continues.
        damage: None, or what is wrong with what follows.
        torn: the damage is a tail: nothing that looks like a record comes after it.
    """

    header: Header
    records: tuple[StepRecord, ...]
    sound: int
    chain: int
    begun: int
    damage: str | None = None
    torn: bool = False

    @property
    def end_step(self) -> int:
        """First step that is not in it."""
        return self.header.first_step + len(self.records)


def record_size(header: Header) -> int:
    """Bytes of each record of a segment."""
    return _FIELDS.size + 4 * header.slots + _CRC.size


def encode_header(header: Header) -> tuple[bytes, int]:
    """Bytes of a header, and the CRC that its records continue."""
    body = json.dumps(header.to_json(), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    raw = _PREFIX.pack(MAGIC, JOURNAL_VERSION, len(body), record_size(header), 0) + body
    chain = zlib.crc32(raw)
    return raw + _CRC.pack(chain), chain


def encode_record(record: StepRecord, header: Header, chain: int) -> tuple[bytes, int]:
    """Bytes of a record that continues ``chain``, and the chain after it.

    Raises:
        ValueError: its terms are not those of the header's directions, in order.
    """
    coefficients = [term.coefficient for term in record.update.terms]
    if record.update.terms != terms_of(record.step, coefficients, header.num_directions):
        raise ValueError(f"step {record.step} names directions that a record of this journal has no room for")
    if len(coefficients) > header.slots or (record.skip is not None and coefficients):
        raise ValueError(f"step {record.step} has {len(coefficients)} coefficients, more than its record may hold")
    beyond = _out_of_bounds(coefficients, record.update.decay, header)
    if beyond is not None:
        raise ValueError(f"step {record.step}: {beyond}")
    flags = (_APPLIED if record.skip is None else 0) | (_HASHED if record.state_hash is not None else 0)
    flags |= _SKIPS.index(record.skip) << _SKIP_SHIFT
    raw = _FIELDS.pack(
        record.step,
        len(coefficients),
        flags,
        record.update.decay,
        record.clean_loss,
        record.spread,
        record.state_hash or 0,
    )
    raw += struct.pack(f"<{header.slots}f", *coefficients, *[0.0] * (header.slots - len(coefficients)))
    chain = zlib.crc32(raw, chain)
    return raw + _CRC.pack(chain), chain


def decode_header(raw: bytes) -> tuple[Header, int, int]:
    """(header, its bytes, the CRC that records continue) from the beginning of a segment.

    Raises:
        DamageError: it is no header, is damaged, or of a version this program does not read.
    """
    if len(raw) < _PREFIX.size:
        raise DamageError("the header is incomplete")
    magic, version, length, size, reserved = _PREFIX.unpack_from(raw)
    if magic != MAGIC:
        older = raw.lstrip()[:1] == b"{"
        raise DamageError("a JSON-lines journal of a version before the first release" if older else "it is no journal")
    end = _PREFIX.size + length
    if length > _MAX_HEADER or len(raw) < end + _CRC.size:
        raise DamageError("the header is incomplete")
    chain = zlib.crc32(raw[:end])
    if chain != _CRC.unpack_from(raw, end)[0]:
        raise DamageError("the header's checksum is wrong")
    if version != JOURNAL_VERSION:
        raise DamageError(f"journal_version is {version}, this zo_ds reads {JOURNAL_VERSION}")
    try:
        header = Header.from_json(json.loads(raw[_PREFIX.size : end]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"the header is malformed: {error}") from error
    if size != record_size(header) or reserved:
        raise DamageError("the header contradicts itself")
    return header, end + _CRC.size, chain


def _decode_record(raw: bytes, header: Header, step: int, chain: int) -> tuple[StepRecord, int]:
    body = raw[: -_CRC.size]
    chain = zlib.crc32(body, chain)
    if chain != _CRC.unpack_from(raw, len(body))[0]:
        raise DamageError("its checksum does not continue the chain")
    found, count, flags, decay, clean_loss, spread, state_hash = _FIELDS.unpack_from(body)
    if found != step:
        raise DamageError(f"step {found} stands where step {step} belongs")
    coefficients = list(struct.unpack_from(f"<{header.slots}f", body, _FIELDS.size))
    reason = flags >> _SKIP_SHIFT
    if reason >= len(_SKIPS) or bool(flags & _APPLIED) == bool(reason) or count > header.slots:
        raise DamageError(f"the flags {flags:#06x} or the count {count} mean nothing")
    beyond = _out_of_bounds(coefficients, decay, header)
    if beyond is not None:
        raise DamageError(beyond)
    if (reason and count) or any(coefficients[count:]) or flags & 0xFC or (state_hash and not flags & _HASHED):
        raise DamageError("a field that must be zero is not")
    update = Update(step, terms_of(step, coefficients[:count], header.num_directions), decay)
    hashed = state_hash if flags & _HASHED else None
    return StepRecord(update, _SKIPS[reason], clean_loss, spread, hashed), chain


def _out_of_bounds(coefficients: list[float], decay: float, header: Header) -> str | None:
    """What is beyond what a step may do to the weights, if anything."""
    # In fp32, as the estimator compares them: the cap itself may round up.
    (cap,) = struct.unpack("<f", struct.pack("<f", header.coefficient_cap))
    if not all(abs(c) <= cap for c in coefficients):
        return f"a coefficient is beyond the cap {header.coefficient_cap:g}, or not finite"
    if not 0.0 <= decay <= 1.0:
        return f"the decay {decay:g} is not between 0 and 1"
    return None


def decode_segments(raw: bytes) -> list[Segment]:
    """The segments in a file: one in a run's journal, one after the other in a shared one.

    Raises:
        DamageError: it does not begin with a sound header.
    """
    segments: list[Segment] = []
    at = 0
    while True:
        try:
            segment = _decode_segment(raw[at:])
        except DamageError as error:
            if not segments:
                raise
            segments[-1] = replace(segments[-1], damage=f"step {segments[-1].end_step}: {error}")
            return segments
        segments.append(segment)
        at += segment.sound
        if segment.damage is not None or at >= len(raw) or raw[at : at + len(MAGIC)] != MAGIC:
            return segments


def _decode_segment(raw: bytes) -> Segment:
    header, at, chain = decode_header(raw)
    begun = chain
    size, records = record_size(header), list[StepRecord]()
    damage: str | None = None
    torn = False
    while at < len(raw) and raw[at : at + len(MAGIC)] != MAGIC:
        piece = raw[at : at + size]
        step = header.first_step + len(records)
        try:
            if len(piece) < size:
                raise DamageError("it is incomplete")
            record, chain = _decode_record(piece, header, step, chain)
        except DamageError as error:
            rest_is_empty = not raw[at + size :].strip(b"\0")
            if piece.strip(b"\0") or not rest_is_empty:
                damage, torn = f"step {step}: {error}", rest_is_empty
            break
        records.append(record)
        at += size
    return Segment(header, tuple(records), at, chain, begun, damage, torn)


def as_lines(segment: Segment) -> list[dict[str, Any]]:
    """A segment as plain data, header first."""
    return [segment.header.to_json(), *(record.to_json() for record in segment.records)]
