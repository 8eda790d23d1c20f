"""The journal says what happened or that it is damaged; it never says something else."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import small_files
from zo_ds.errors import CorruptRunError, DataError, MachineError
from zo_ds.journal.binary import (
    DamageError,
    as_lines,
    decode_header,
    decode_segments,
    encode_header,
    encode_record,
    record_size,
)
from zo_ds.journal.history import History, read_journal, segment_name
from zo_ds.journal.journal import Journal
from zo_ds.journal.records import Header, StepRecord, terms_of
from zo_ds.journal.replay import replay_
from zo_ds.journal.stream import from_bytes, to_bytes
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.estimators import EstimatorSpec, SkipReason, verdict
from zo_ds.maths.update import Term, Update
from zo_ds.stores.base import weights_sha256

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden"
HEADER = Header(
    run_id="00ff",
    run_seed=2**64 - 1,
    noise=NoiseStructure.FACTORED,
    estimator="fzoo",
    num_directions=2,
    coefficient_cap=2.0,
    base_sha256="ab" * 32,
    parameters=(
        ParamInfo("a.weight", (3, 5), torch.bfloat16),
        ParamInfo("größe", (7,), torch.float32),
        ParamInfo("s", (), torch.float16),
    ),
    zo_ds="0.1.0",
    base_model={"path": "models/größe", "revision": None},
)
FORK = replace(HEADER, run_seed=5, noise=NoiseStructure.DENSE, num_directions=3)
SKIPS = {0: None, 1: SkipReason.NON_FINITE, 2: SkipReason.ZERO_SPREAD, 3: SkipReason.COEFFICIENT_CAP}


def record_of(step: int, header: Header = HEADER) -> StepRecord:
    """A record without NaNs, so that it equals itself."""
    if step % 7 == 6:
        return StepRecord(Update(step, ()), SKIPS[step % 3 + 1], 0.5 * step, math.inf)
    coefficients = [(step * 37 % 101 - 50 + slot) / 4096 for slot in range(header.slots)]
    update = Update(step, terms_of(step, coefficients, header.num_directions), 1e-4)
    return StepRecord(update, None, 2.25 - step / 64, 0.125, 2**64 - 1 - step if step % 5 == 0 else None)


def records_of(first: int, last: int, header: Header = HEADER) -> list[StepRecord]:
    return [record_of(step, header) for step in range(first, last)]


def write(folder: Path, *ends: int, header: Header = HEADER) -> Path:
    """A closed journal whose segments end before the given steps."""
    journal = Journal.create(folder, header)
    for number, end in enumerate(ends):
        if number:
            journal.rotate()
        for step in range(journal.next_step, end):
            journal.append(record_of(step, header))
    journal.close()
    return folder


def encoded(header: Header, records: Sequence[StepRecord]) -> bytes:
    raw, chain = encode_header(header)
    for record in records:
        part, chain = encode_record(record, header, chain)
        raw += part
    return raw


def file(folder: Path, number: int = 0) -> Path:
    return folder / segment_name(number)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def bits(record: StepRecord) -> tuple[Any, ...]:
    """Comparable, NaN included, and -0.0 told apart from 0.0."""
    update = record.update
    floats = struct.pack("<3d", update.decay, record.clean_loss, record.spread)
    coefficients = struct.pack(f"<{len(update.terms)}f", *(term.coefficient for term in update.terms))
    directions = [(term.step, term.direction) for term in update.terms]
    return record.step, record.skip, record.state_hash, directions, floats, coefficients


def crafted_header(tree: Any, size: int, version: int = 2, reserved: int = 0) -> bytes:
    """A header as documented, written independently, whatever it says."""
    body = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    raw = struct.pack("<8sIIII", b"ZODSJRNL", version, len(body), size, reserved) + body
    return raw + struct.pack("<I", zlib.crc32(raw))


def crafted_records(chain: int, *records: tuple[Any, ...]) -> bytes:
    """Records as documented: step, count, flags, decay, clean loss, spread, state hash, then all slots."""
    raw = b""
    for record in records:
        body = struct.pack("<IHHdddQ", *record[:7]) + struct.pack(f"<{len(record) - 7}f", *record[7:])
        chain = zlib.crc32(body, chain)
        raw += body + struct.pack("<I", chain)
    return raw


def crafted(tree: Any, size: int, *records: tuple[Any, ...]) -> bytes:
    raw = crafted_header(tree, size)
    return raw + crafted_records(zlib.crc32(raw[:-4]), *records)


# --- The bytes ---


@pytest.mark.parametrize("window", [1, 3])
def test_round_trip(window: int) -> None:
    header = replace(HEADER, window=window, first_step=10, segment=4, chain=2**32 - 1)
    records = [
        StepRecord(Update(10, terms_of(10, [0.5, -1.5] * window, 2), 0.1), None, 2.25, 0.125, 0),
        StepRecord(Update(11, ()), SkipReason.NON_FINITE, math.nan, math.inf, 2**64 - 1),
        StepRecord(Update(12, ()), SkipReason.ZERO_SPREAD, -math.inf, 0.0),
        StepRecord(Update(13, ()), SkipReason.COEFFICIENT_CAP, -0.0, 5e-324),
        StepRecord(Update(14, terms_of(14, [2.0**-149], 2), 1e-300), None, 0.1, 1 / 3),
        StepRecord(Update(15, terms_of(15, [-0.0, -(2.0**-149)], 2), 1.0), None, 1e308, -1e308),
        StepRecord(Update(16, ()), None, 1.0, 1.0),
    ]
    raw = encoded(header, records)
    (segment,) = decode_segments(raw)
    assert segment.header == header
    assert [bits(r) for r in segment.records] == [bits(r) for r in records]
    assert (segment.sound, segment.damage, segment.torn, segment.end_step) == (len(raw), None, False, 17)
    assert segment.chain == struct.unpack("<I", raw[-4:])[0]


def test_coefficients_name_the_directions_of_older_steps() -> None:
    header = replace(HEADER, window=2)
    (segment,) = decode_segments(encoded(header, [record_of(0, header), record_of(1, header)]))
    directions = [(term.step, term.direction) for term in segment.records[1].update.terms]
    assert directions == [(1, 0), (1, 1), (0, 0), (0, 1)]


def test_what_older_steps_depend_on_is_part_of_the_mathematics() -> None:
    header = replace(HEADER, window=2, past={"momentum": 0.9, "eps": 1e-3})
    (segment,) = decode_segments(encoded(header, []))
    assert segment.header == header
    assert segment.header.maths() == {**HEADER.maths(), "window": 2, "past": {"momentum": 0.9, "eps": 1e-3}}
    assert HEADER.maths()["past"] is None
    assert "past" not in HEADER.to_json()


def test_a_learning_rate_that_was_found_comes_back_and_is_no_mathematics() -> None:
    """Coefficients are in weight units: no learning rate decides how they become weights."""
    trials = [[0.1, 2.5], [0.2, None], [1e-300, 1.7976931348623157e308]]
    lr = {"value": 0.1 + 0.2, "how": "range", "best_single_step": 1 / 3, "trials": trials, "forwards": 17}
    header = replace(HEADER, lr=lr)
    (segment,) = decode_segments(encoded(header, []))
    assert segment.header == header
    assert segment.header.lr == lr
    assert segment.header.maths() == HEADER.maths()
    assert segment.header.following(3, 7).lr == lr
    assert "lr" not in HEADER.to_json()
    assert decode_segments(encoded(HEADER, []))[0].header.lr is None


@settings(max_examples=100)
@given(data=st.data())
def test_every_bit_comes_back(data: st.DataObject) -> None:
    header = replace(
        HEADER,
        num_directions=data.draw(st.integers(1, 5)),
        window=data.draw(st.integers(1, 3)),
        first_step=data.draw(st.integers(3, 2**32 - 4)),
        coefficient_cap=data.draw(st.floats(0.5, 2)),
    )
    cap = float(torch.tensor(header.coefficient_cap)) / 2
    small = st.floats(-cap, cap, width=32)
    records = []
    for step in range(header.first_step, header.first_step + data.draw(st.integers(0, 4))):
        skip = data.draw(st.sampled_from([None, None, *SkipReason]))
        coefficients = data.draw(st.lists(small, max_size=header.slots)) if skip is None else []
        update = Update(step, terms_of(step, coefficients, header.num_directions), data.draw(st.floats(0, 1)))
        hashed = data.draw(st.none() | st.integers(0, 2**64 - 1))
        records.append(StepRecord(update, skip, data.draw(st.floats()), data.draw(st.floats()), hashed))
    raw = encoded(header, records)
    (segment,) = decode_segments(raw + bytes(data.draw(st.integers(0, 200))))
    assert segment.header == header
    assert [bits(r) for r in segment.records] == [bits(r) for r in records]
    assert (segment.sound, segment.damage) == (len(raw), None)


TREE = {
    "format": "zo_ds journal",
    "noise_version": 1,
    "update_version": 1,
    "hash_version": 1,
    "zo_ds": "0.1.0",
    "run_id": "00ff",
    "run_seed": 2**64 - 1,
    "noise": "factored",
    "estimator": "fzoo",
    "num_directions": 2,
    "window": 1,
    "coefficient_cap": 2.0,
    "base_sha256": "ab" * 32,
    "base_model": {"path": "models/größe", "revision": None},
    "parameters": [
        {"name": "a.weight", "shape": [3, 5], "dtype": "bfloat16", "param_id": 251399155},
        {"name": "größe", "shape": [7], "dtype": "float32", "param_id": 1738691539},
        {"name": "s", "shape": [], "dtype": "float16", "param_id": 2272344580},
    ],
    "segment": 0,
    "first_step": 0,
    "chain": 0,
}


def test_format_is_frozen(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "j", HEADER)
    journal.append(StepRecord(Update(0, (Term(0, 0, 0.5), Term(0, 1, -1.5)), 0.1), None, 2.25, 0.125, 2**64 - 2))
    journal.append(StepRecord(Update(1, ()), SkipReason.ZERO_SPREAD, math.inf, 0.0))
    journal.append(StepRecord(Update(2, (Term(2, 0, -0.0),), 1e-300), None, 0.1, 1 / 3, 0))
    journal.close()
    frozen = crafted(
        TREE,
        52,
        (0, 2, 1 | 2, 0.1, 2.25, 0.125, 2**64 - 2, 0.5, -1.5),
        (1, 0, 2 << 8, 0.0, math.inf, 0.0, 0, 0.0, 0.0),
        (2, 1, 1 | 2, 1e-300, 0.1, 1 / 3, 0, -0.0, 0.0),
    )
    assert file(tmp_path / "j").read_bytes() == frozen
    assert record_size(HEADER) == 52


def test_next_segment_names_the_one_before(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 2, 3)
    first, second = file(folder, 0).read_bytes(), file(folder, 1).read_bytes()
    (chain,) = struct.unpack("<I", first[-4:])
    assert second.startswith(crafted_header({**TREE, "segment": 1, "first_step": 2, "chain": chain}, 52))
    assert len(second) == len(first) - 52 + len(str(chain)) - 1


def test_lines_are_plain_data() -> None:
    (segment,) = decode_segments(encoded(HEADER, records_of(0, 7)))
    head, *lines = as_lines(segment)
    assert head == TREE
    assert lines[0] == {
        "step": 0,
        "skip": None,
        "coefficients": [-50 / 4096, -49 / 4096],
        "decay": 1e-4,
        "clean_loss": 2.25,
        "spread": 0.125,
        "state_hash": "f" * 16,
    }
    assert (lines[6]["skip"], lines[6]["coefficients"], lines[6]["state_hash"]) == ("non_finite_loss", [], None)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 9, 20])
def test_the_last_records_back_to_where_the_mathematics_changed(count: int, tmp_path: Path) -> None:
    history = read_journal(write(tmp_path / "same", 3, 3, 8))
    assert history.before_the_end(0, count, HEADER.maths()) == (records_of(max(0, 8 - count), 8), True)
    assert history.before_the_end(5, count, FORK.maths()) == ([], True)
    fork = forked(tmp_path / "fork")
    assert fork.before_the_end(0, count, FORK.maths()) == (records_of(max(6, 9 - count), 9, FORK), True)
    assert fork.before_the_end(0, count, HEADER.maths()) == ([], True)
    file(tmp_path / "same").unlink()
    late = read_journal(tmp_path / "same")
    assert late.before_the_end(3, count, HEADER.maths()) == (records_of(max(3, 8 - count), 8), count <= 5)


@pytest.mark.parametrize("terms", [(Term(0, 1, 0.5),), (Term(0, 0, 0.5),) * 2, (Term(1, 0, 0.5),)])
def test_terms_that_a_record_cannot_name_are_refused(terms: tuple[Term, ...]) -> None:
    with pytest.raises(ValueError, match="step 0 names directions"):
        encode_record(StepRecord(Update(0, terms), None, 0.0, 0.0), HEADER, 0)


def test_too_many_coefficients_are_refused() -> None:
    with pytest.raises(ValueError, match="step 1 has 3 coefficients"):
        encode_record(StepRecord(Update(1, terms_of(1, [0.1] * 3, 2)), None, 0.0, 0.0), HEADER, 0)


def test_coefficient_at_the_cap_is_read_back() -> None:
    spec = EstimatorSpec(num_directions=4, coefficient_cap=0.1)
    rounded = float(torch.tensor(0.1))
    losses = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    found = verdict(losses, spec, lr=0.1 * 4 * 0.5, eps=1e-3)
    assert found.skip is None
    assert float(found.coefficients[3]) == rounded > 0.1
    header = replace(HEADER, num_directions=4, coefficient_cap=0.1)
    record = StepRecord(Update(0, terms_of(0, found.coefficients.tolist(), 4)), None, 0.0, found.spread)
    (segment,) = decode_segments(encoded(header, [record]))
    assert segment.records == (record,)


@pytest.mark.parametrize(
    "record",
    [
        StepRecord(Update(0, (Term(0, 0, math.nan),)), None, 0.0, 0.0),
        StepRecord(Update(0, (Term(0, 0, 2.5),)), None, 0.0, 0.0),
        StepRecord(Update(0, (), math.inf), None, 0.0, 0.0),
        StepRecord(Update(0, (Term(0, 0, 0.5),)), SkipReason.NON_FINITE, 0.0, 0.0),
    ],
)
def test_what_could_not_be_read_is_not_written(record: StepRecord) -> None:
    with pytest.raises(ValueError, match="step 0"):
        encode_record(record, HEADER, 0)


# --- Damage ---

TINY = replace(HEADER, num_directions=1, parameters=(ParamInfo("w", (2,), torch.float32),), base_model=None)
TRUTH = tuple(records_of(0, 100, TINY))
RAW = encoded(TINY, TRUTH)
SIZE = record_size(TINY)
HEAD = len(RAW) - 100 * SIZE
PIECES = [RAW[at : at + SIZE] for at in range(HEAD, len(RAW), SIZE)]


def judged(raw: bytes, sound: int) -> str:
    """What reading says; anything but a prefix of the truth, of the expected length, is an error."""
    try:
        segments = decode_segments(raw)
    except DamageError:
        assert sound < 0
        return "refused"
    assert len(segments) == 1
    (segment,) = segments
    assert segment.header == TINY
    assert segment.records == TRUTH[: len(segment.records)]
    assert len(segment.records) == sound
    if segment.damage is None:
        return "silent"
    assert segment.damage.startswith(f"step {sound}: ")
    return "torn" if segment.torn else "reported"


def test_untouched_bytes_are_whole() -> None:
    assert judged(RAW, 100) == "silent"
    assert judged(RAW + bytes(3 * SIZE + 5), 100) == "silent"


def test_truncation_anywhere() -> None:
    outcomes = Counter(judged(RAW[:length], (length - HEAD) // SIZE) for length in range(len(RAW)))
    # At a record's end, or within the zeros that step 0 begins with, nothing is seen to be missing.
    assert outcomes == {"refused": HEAD, "silent": 100 + 4, "torn": 100 * SIZE - 104}


def test_flip_of_any_bit() -> None:
    outcomes: Counter[str] = Counter()
    for at in range(len(RAW)):
        sound = (at - HEAD) // SIZE if at >= HEAD else -1
        outcomes.update(judged(flipped(RAW, at, bit), sound) for bit in range(8))
    assert outcomes == {"refused": 8 * HEAD, "reported": 8 * 99 * SIZE, "torn": 8 * SIZE}


def test_records_out_of_place() -> None:
    for n in range(100):
        last = n == 99
        assert judged(RAW[:HEAD] + b"".join([*PIECES[: n + 1], *PIECES[n:]]), n + 1) == ("torn" if last else "reported")
        dropped = judged(RAW[:HEAD] + b"".join([*PIECES[:n], *PIECES[n + 1 :]]), n)
        assert dropped == ("silent" if last else "torn" if n == 98 else "reported")
        if not last:
            swapped = [*PIECES[:n], PIECES[n + 1], PIECES[n], *PIECES[n + 2 :]]
            assert judged(RAW[:HEAD] + b"".join(swapped), n) == "reported"


def test_zeros_in_place_of_records() -> None:
    for n in range(100):
        at = HEAD + n * SIZE
        one = judged(RAW[:at] + bytes(SIZE) + RAW[at + SIZE :], n)
        assert one == ("silent" if n == 99 else "reported")
        # Not to be told from space that was never used.
        assert judged(RAW[:at] + bytes(len(RAW) - at), n) == "silent"


@settings(max_examples=300)
@given(at=st.integers(0, len(RAW) - 1), garbage=st.binary(min_size=1, max_size=200), shift=st.booleans())
def test_garbage_never_becomes_a_record(at: int, garbage: bytes, shift: bool) -> None:
    raw = RAW[:at] + garbage + RAW[at if shift else at + len(garbage) :]
    try:
        (segment,) = decode_segments(raw)
    except DamageError:
        assert at < HEAD
        return
    assert segment.records == TRUTH[: len(segment.records)]
    assert len(segment.records) >= (at - HEAD) // SIZE
    assert raw == RAW or segment.damage is not None or len(segment.records) == 100 or not any(raw[segment.sound :])


def test_blank_header() -> None:
    for length in (0, 1, 23, 24, HEAD, HEAD + SIZE):
        with pytest.raises(DamageError):
            decode_segments(bytes(length) + RAW[length:] if length else b"")


GOOD = (0, 2, 1, 0.1, 2.25, 0.125, 0, 0.5, -1.5)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ((1, *GOOD[1:]), "step 1 stands where step 0 belongs"),
        ((*GOOD[:2], 0, *GOOD[3:]), "mean nothing"),
        ((*GOOD[:2], 1 | 1 << 8, *GOOD[3:]), "mean nothing"),
        ((*GOOD[:2], 4 << 8, *GOOD[3:]), "mean nothing"),
        ((0, 3, *GOOD[2:]), "mean nothing"),
        ((*GOOD[:2], 1 | 4, *GOOD[3:]), "must be zero"),
        ((*GOOD[:2], 1 | 128, *GOOD[3:]), "must be zero"),
        ((0, 1, *GOOD[2:]), "must be zero"),
        ((0, 0, 1 << 8, *GOOD[3:]), "must be zero"),
        ((0, 2, 1 << 8, *GOOD[3:]), "must be zero"),
        ((*GOOD[:6], 7, *GOOD[7:]), "must be zero"),
        ((*GOOD[:7], 2.5, 0.0), "beyond the cap"),
        ((*GOOD[:7], -2.5, 0.0), "beyond the cap"),
        ((*GOOD[:7], math.nan, 0.0), "beyond the cap"),
        ((*GOOD[:3], math.nan, *GOOD[4:]), "not between 0 and 1"),
        ((*GOOD[:3], -0.5, *GOOD[4:]), "not between 0 and 1"),
        ((*GOOD[:3], 1.5, *GOOD[4:]), "not between 0 and 1"),
        ((*GOOD[:3], math.inf, *GOOD[4:]), "not between 0 and 1"),
    ],
)
def test_malformed_record_with_a_right_checksum(record: tuple[Any, ...], why: str) -> None:
    (good,) = decode_segments(crafted(TREE, 52, GOOD))
    assert len(good.records) == 1
    (segment,) = decode_segments(crafted(TREE, 52, record, GOOD))
    assert segment.records == ()
    assert segment.damage is not None
    assert why in segment.damage
    assert not segment.torn


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in TREE.items() if k != key}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (crafted_header({**TREE, "noise_version": 2}, 52), "noise_version is 2, this zo_ds reads 1"),
        (crafted_header({**TREE, "update_version": 0}, 52), "update_version is 0, this zo_ds reads 1"),
        (crafted_header({**TREE, "hash_version": 9}, 52), "hash_version is 9, this zo_ds reads 1"),
        (crafted_header(TREE, 52, version=3), "journal_version is 3, this zo_ds reads 2"),
        (crafted_header({"format": "other"}, 52), "does not start with a zo_ds journal header"),
        (crafted_header([1, 2], 52), "malformed"),
        (crafted_header(without("run_seed"), 52), "run_seed"),
        (crafted_header(without("noise_version"), 52), "noise_version"),
        (crafted_header({**TREE, "noise": "pink"}, 52), "pink"),
        (crafted_header({**TREE, "parameters": [{"name": "a", "shape": [1], "dtype": "float33"}]}, 52), "float33"),
        (crafted_header({**TREE, "num_directions": 0}, 44), "out of range"),
        (crafted_header({**TREE, "window": 0}, 44), "out of range"),
        (crafted_header({**TREE, "first_step": -1}, 52), "out of range"),
        (crafted_header({**TREE, "past": [0.9]}, 52), "'past' is malformed"),
        *[
            (crafted_header({**TREE, "lr": {"how": "rule", "value": value}}, 52), "'lr' is malformed")
            for value in (0.0, -1e-3, math.inf, math.nan, "1e-3", True, None, [1e-3])
        ],
        (crafted_header({**TREE, "lr": {"how": "rule"}}, 52), "malformed: 'value'"),
        (crafted_header({**TREE, "lr": 1e-3}, 52), "the header is malformed"),
        (crafted_header({**TREE, "lr": [1e-3]}, 52), "the header is malformed"),
        (crafted_header(TREE, 56), "contradicts itself"),
        (crafted_header(TREE, 52, reserved=1), "contradicts itself"),
        (b'{"format":"zo_ds journal","journal_version":1}\n', "JSON-lines journal of a version before the first"),
        (b"PK\x03\x04" + bytes(100), "it is no journal"),
        (b"ZODSJRNL", "the header is incomplete"),
        (struct.pack("<8sIIII", b"ZODSJRNL", 2, 2**32 - 1, 52, 0), "the header is incomplete"),
    ],
)
def test_header_of_something_else(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(DamageError, match=why):
        decode_header(raw)
    path = tmp_path / "j.zoj"
    path.write_bytes(raw)
    with pytest.raises(CorruptRunError, match=why) as caught:
        read_journal(path)
    assert caught.value.where == str(path)


def test_no_journal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no journal: No such file"):
        read_journal(tmp_path / "none")
    with pytest.raises(DataError, match="no journal: the folder has no segments"):
        read_journal(tmp_path)


# --- Segments ---


def test_segments_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9)
    assert names(folder) == ["000000.zoj", "000001.zoj", "000002.zoj"]
    history = read_journal(folder)
    assert history.whole
    assert history.problems == ()
    assert history.header == HEADER
    assert history.files == (file(folder, 0), file(folder, 1), file(folder, 2))
    assert [history.end_of(step) for step in (0, 3, 9, 10)] == [9, 9, 9, None]
    assert history.steps == 9
    assert history.records() == records_of(0, 9)
    assert history.records(4) == records_of(4, 9)
    assert [s.records for s in history.stretches(2, 7)] == [
        tuple(records_of(2, 3)),
        tuple(records_of(3, 6)),
        tuple(records_of(6, 7)),
    ]
    assert history.stretches(5, 5) == []
    segment, path, later = history.continuation(0)
    assert (segment, path, later) == (history.segments[2], file(folder, 2), [])
    for first, last in ((0, 10), (5, 4), (-1, 2)):
        with pytest.raises(ValueError, match=f"the journal has 9 steps, asked for {first} to {last}"):
            history.stretches(first, last)


def test_rotate_to_other_constants(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    journal = Journal.create(folder, HEADER)
    journal.append(record_of(0))
    journal.rotate(replace(FORK, run_id="other", base_model=None))
    assert (journal.header.run_id, journal.header.segment, journal.header.first_step) == ("00ff", 1, 1)
    number, chain = journal.position
    journal.append(record_of(1, FORK))
    journal.close()
    history = read_journal(folder)
    assert history.whole
    assert history.records() == [record_of(0), record_of(1, FORK)]
    assert [s.header.maths() for s in history.stretches(0, 2)] == [HEADER.maths(), FORK.maths()]
    assert (number, chain) == (1, decode_header(file(folder, 1).read_bytes())[2])


def test_missing_segment(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9)
    file(folder, 1).unlink()
    history = read_journal(folder)
    assert not history.whole
    assert history.problems == (f"{file(folder, 2)}: does not continue the segment before it",)
    assert [history.end_of(step) for step in (0, 3, 4, 5, 6, 9)] == [3, 3, None, None, 9, 9]
    assert history.records() == records_of(0, 3)
    assert history.records(6, 9) == records_of(6, 9)
    for first, step in ((0, 3), (4, 4)):
        with pytest.raises(CorruptRunError, match=f"cannot be read at step {step}") as caught:
            history.stretches(first, 9)
        assert "does not continue" in caught.value.why


def test_missing_first_segment(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    file(folder, 0).unlink()
    history = read_journal(folder)
    assert history.problems == (f"{file(folder, 1)}: the segments before it are missing",)
    assert (history.steps, history.end_of(0), history.end_of(3)) == (0, None, 6)
    with pytest.raises(CorruptRunError, match="cannot be read at step 0"):
        history.records()


@pytest.mark.parametrize(
    ("ends", "rotated"),
    [((3, 6), True), ((5, 9), True), ((5,), False)],
    ids=["tried again at once", "tried again later", "not tried again"],
)
def test_left_over_segment_hides_nothing(tmp_path: Path, ends: tuple[int, ...], rotated: bool) -> None:
    """Rotation failed after step 2, and the segment that it had begun could not be removed."""
    folder = write(tmp_path / "j", *ends)
    chain = decode_segments(encoded(HEADER, records_of(0, 3)))[0].chain
    if rotated:
        file(folder, 1).rename(file(folder, 2))
    file(folder, 1).write_bytes(encoded(HEADER.following(3, chain), []))
    history = read_journal(folder)
    assert history.records() == records_of(0, ends[-1])
    after = finish(folder, history, 0, 12)
    assert after.records() == records_of(0, 12)


def test_unreadable_header(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9)
    file(folder, 1).write_bytes(flipped(file(folder, 1).read_bytes(), 30, 0))
    history = read_journal(folder)
    assert history.unreadable == (file(folder, 1),)
    assert f"{file(folder, 1)}: the header's checksum is wrong" in history.problems
    assert (history.end_of(0), history.end_of(6)) == (3, 9)
    assert history.continuation(0)[1:] == (file(folder, 0), [file(folder, 2), file(folder, 1)])
    assert history.continuation(6)[1:] == (file(folder, 2), [])


def test_nothing_readable(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3)
    file(folder).write_bytes(b'{"format": "zo_ds journal"}\n')
    with pytest.raises(CorruptRunError, match="the journal is damaged") as caught:
        read_journal(folder)
    assert "JSON-lines" in caught.value.why


def test_garbage_behind_a_segment_that_another_continues(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    with file(folder).open("ab") as handle:
        handle.write(b"garbage")
    history = read_journal(folder)
    assert history.records() == records_of(0, 6)
    assert not history.whole
    assert "step 3: it is incomplete" in history.problems[0]


def test_lost_record_before_another_segment(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    os.truncate(file(folder), file(folder).stat().st_size - 20)
    history = read_journal(folder)
    assert history.records() == records_of(0, 2)
    assert history.records(3, 6) == records_of(3, 6)
    assert [history.end_of(step) for step in (0, 2, 3)] == [2, 2, 6]
    assert len(history.problems) == 2
    assert not history.whole


def test_a_torn_last_record_is_no_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    os.truncate(file(folder, 1), file(folder, 1).stat().st_size - 20)
    history = read_journal(folder)
    assert history.whole
    assert len(history.problems) == 1
    assert history.records() == records_of(0, 5)


def swapped(folder: Path) -> None:
    first, second = file(folder, 0).read_bytes(), file(folder, 1).read_bytes()
    file(folder, 0).write_bytes(second)
    file(folder, 1).write_bytes(first)


def test_names_of_files_do_not_matter(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    swapped(folder)
    history = read_journal(folder)
    assert history.whole
    assert history.files == (file(folder, 1), file(folder, 0))
    assert history.records() == records_of(0, 6)
    assert history.continuation(0)[1:] == (file(folder, 0), [])


def test_no_segment_is_written_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    swapped(folder)
    file(folder, 1).rename(file(folder, 2))
    journal = Journal.reopen(folder, read_journal(folder))
    journal.rotate()
    journal.append(record_of(6))
    journal.rotate()
    journal.append(record_of(7))
    journal.close()
    assert read_journal(folder).problems == ()
    assert read_journal(folder).records() == records_of(0, 8)
    assert len(names(folder)) == 4


def test_segment_of_another_run_is_not_taken(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3)
    other = write(tmp_path / "other", 6, header=replace(HEADER, run_id="beef", run_seed=1))
    file(folder, 1).write_bytes(file(other).read_bytes())
    history = read_journal(folder)
    assert history.problems == (f"{file(folder, 1)}: it belongs to another run",)
    assert history.unreadable == (file(folder, 1),)
    assert history.end_of(0) == 3
    assert [s.header.run_seed for s in history.stretches(0, 3)] == [HEADER.run_seed]


def test_continuation_of_another_run_is_not_taken(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "j", 3, 6), write(tmp_path / "o", 3, 9, header=replace(HEADER, run_id="beef"))
    file(folder, 1).write_bytes(file(other, 1).read_bytes())
    history = read_journal(folder)
    assert not history.whole
    assert history.end_of(0) == 3
    assert history.records() == records_of(0, 3)


def test_a_segment_that_cannot_be_read_is_one_damaged_segment(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9)
    file(folder, 1).unlink()
    file(folder, 1).mkdir()  # read() fails, as from a bad sector
    assert read_journal(folder).steps == 3


# --- Writing ---


def test_create_refuses_a_journal(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3)
    with pytest.raises(MachineError, match="there is a journal already"):
        Journal.create(folder, HEADER)
    file(folder).rename(file(folder, 7))
    with pytest.raises(MachineError, match="there is a journal already"):
        Journal.create(folder, HEADER)
    assert names(folder) == [segment_name(7)]


def test_create_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot start the journal: "):
        Journal.create(tmp_path / "file" / "j", HEADER)
    with small_files(1000), pytest.raises(MachineError, match="cannot start the journal: File too large"):
        Journal.create(tmp_path / "j", HEADER)
    assert names(tmp_path / "j") == []


def test_leftover_of_a_killed_process_is_no_journal(tmp_path: Path) -> None:
    folder = tmp_path / "j"
    folder.mkdir()
    (folder / "000000.tmp").write_bytes(b"x" * 100_000)
    write(folder, 3)
    assert names(folder) == ["000000.zoj"]
    assert read_journal(folder).records() == records_of(0, 3)


def test_space_for_the_run_is_there_before_it_begins(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "j", HEADER, total_steps=200)
    path, head = file(tmp_path / "j"), len(encode_header(HEADER)[0])
    assert path.stat().st_size == head + 200 * 52
    assert path.stat().st_blocks * 512 >= head + 200 * 52
    with small_files(path.stat().st_size):
        for step in range(200):
            journal.append(record_of(step))
        with pytest.raises(MachineError, match="cannot write the journal: File too large"):
            journal.append(record_of(200))
    assert read_journal(path).records() == records_of(0, 200)
    journal.append(record_of(200))
    journal.close()
    assert path.stat().st_size == head + 201 * 52
    assert read_journal(path).records() == records_of(0, 201)


def test_space_of_later_segments(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "j", HEADER, total_steps=100)
    for step in range(60):
        journal.append(record_of(step))
    journal.rotate()
    first, second = file(tmp_path / "j"), file(tmp_path / "j", 1)
    assert first.stat().st_size == len(encode_header(HEADER)[0]) + 60 * 52
    size = second.stat().st_size
    assert size == len(encode_header(journal.header)[0]) + 40 * 52
    journal.close()
    history = read_journal(tmp_path / "j")
    assert second.stat().st_size == size - 40 * 52
    Journal.reopen(tmp_path / "j", history, total_steps=100)
    assert second.stat().st_size == size
    assert second.stat().st_blocks * 512 >= size
    assert read_journal(tmp_path / "j").whole


def test_group_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    journal = Journal.create(tmp_path / "j", HEADER, total_steps=20, sync_every=3)
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle))[1])
    durable = []
    for step in range(7):
        journal.append(record_of(step))
        durable.append(journal.durable_steps)
    assert durable == [0, 0, 3, 3, 3, 6, 6]
    assert len(synced) == 2
    assert read_journal(tmp_path / "j").records() == records_of(0, 7)
    journal.sync()
    assert (journal.durable_steps, len(synced)) == (7, 3)
    journal.sync()
    assert len(synced) == 3
    journal.append(record_of(7))
    journal.rotate()
    assert journal.durable_steps == 8
    journal.append(record_of(8))
    journal.close()
    assert read_journal(tmp_path / "j").records() == records_of(0, 9)
    assert read_journal(tmp_path / "j").whole


# --- Going on ---


def finish(folder: Path, history: History, start: int, end: int, header: Header = HEADER) -> History:
    """Reopen, append up to a step, read again."""
    journal = Journal.reopen(folder, history, start, total_steps=end)
    for step in range(journal.next_step, end):
        journal.append(record_of(step, header))
    journal.close()
    return read_journal(folder)


def test_reopen_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    journal = Journal.reopen(folder, read_journal(folder))
    assert (journal.next_step, journal.durable_steps, journal.position[0]) == (6, 6, 1)
    journal.close()
    history = finish(folder, read_journal(folder), 0, 9)
    assert history.whole
    assert history.records() == records_of(0, 9)
    assert len(history.segments) == 2


@pytest.mark.parametrize("torn", range(1, 52))
def test_reopen_blanks_a_torn_tail(tmp_path: Path, torn: int) -> None:
    folder = write(tmp_path / "j", 3, 6)
    path = file(folder, 1)
    raw = path.read_bytes()
    path.write_bytes(raw[:-52] + raw[-52:][:torn] + bytes(300))
    history = finish(folder, read_journal(folder), 0, 6)
    assert history.problems == ()
    assert history.records() == records_of(0, 6)
    assert names(folder) == ["000000.zoj", "000001.zoj"]


def test_reopen_keeps_what_was_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 9)
    path = file(folder)
    raw = flipped(path.read_bytes(), len(path.read_bytes()) - 5 * 52 + 8, 3)
    path.write_bytes(raw)
    history = read_journal(folder)
    assert (history.steps, history.whole) == (4, False)
    after = finish(folder, history, 0, 6)
    assert after.problems == ()
    assert after.records() == records_of(0, 6)
    (kept,) = folder.glob("*.damaged")
    assert kept.name.startswith("000000.")
    assert kept.read_bytes() == raw


def test_reopen_sets_later_segments_aside(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9, 12)
    path = file(folder, 1)
    path.write_bytes(flipped(path.read_bytes(), len(path.read_bytes()) - 52, 0))
    file(folder, 3).write_bytes(b"unreadable")
    later = {"000002.": file(folder, 2).read_bytes(), "000003.": b"unreadable"}
    after = finish(folder, read_journal(folder), 0, 7)
    assert after.problems == ()
    assert after.records() == records_of(0, 7)
    kept = {f.name[:7]: f.read_bytes() for f in folder.glob("*.damaged") if f.name[:7] in later}
    assert kept == later


def test_reopen_behind_a_damaged_segment(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9)
    path = file(folder, 1)
    path.write_bytes(flipped(path.read_bytes(), len(path.read_bytes()) - 52, 0))
    before = path.read_bytes()
    after = finish(folder, read_journal(folder), 6, 12)
    assert after.end_of(0) == 5
    assert after.records(6, 12) == records_of(6, 12)
    assert path.read_bytes() == before
    assert names(folder) == ["000000.zoj", "000001.zoj", "000002.zoj"]


def test_rotation_after_going_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6, 9)
    os.truncate(file(folder, 1), file(folder, 1).stat().st_size - 52)
    journal = Journal.reopen(folder, read_journal(folder))
    journal.append(record_of(5))
    journal.rotate(FORK)
    journal.append(record_of(6, FORK))
    journal.close()
    history = read_journal(folder)
    assert history.problems == ()
    assert history.records() == [*records_of(0, 6), record_of(6, FORK)]


# --- One string of bytes ---


def forked(folder: Path) -> History:
    """Steps 0-2, 3-5 | 6-8 of a fork."""
    write(folder, 3, 6)
    journal = Journal.reopen(folder, read_journal(folder))
    journal.rotate(FORK)
    for step in range(6, 9):
        journal.append(record_of(step, FORK))
    journal.close()
    return read_journal(folder)


@pytest.mark.parametrize(
    ("first", "last", "ends"), [(0, 9, [6, 9]), (2, 8, [6, 8]), (0, 6, [6]), (6, 9, [9]), (4, 5, [5]), (0, 0, [0])]
)
def test_stream(tmp_path: Path, first: int, last: int, ends: list[int]) -> None:
    history = forked(tmp_path / "j")
    raw = to_bytes(history, first, last)
    found = from_bytes(raw, "stream")
    assert found.whole
    assert [s.end_step for s in found.segments] == ends
    assert [s.header.segment for s in found.segments] == list(range(len(ends)))
    assert found.segments[0].header.first_step == first
    assert found.end_of(first) == last
    assert found.records(first, last) == history.records(first, last)
    assert [s.header.maths() for s in found.segments] == [(HEADER if end <= 6 else FORK).maths() for end in ends]
    assert to_bytes(found, first, last) == raw
    path = tmp_path / "shared.zoj"
    path.write_bytes(raw)
    assert read_journal(path).segments == found.segments
    assert read_journal(path).problems == ()


def test_stream_of_nothing_from_the_middle(tmp_path: Path) -> None:
    found = from_bytes(to_bytes(forked(tmp_path / "j"), 4, 4), "stream")
    assert (found.end_of(4), found.end_of(0)) == (4, None)


def test_stream_over_damage_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "j", 3, 6)
    os.truncate(file(folder), file(folder).stat().st_size - 1)
    with pytest.raises(CorruptRunError, match="cannot be read at step 2"):
        to_bytes(read_journal(folder), 0, 6)


def test_damaged_stream_is_told(tmp_path: Path) -> None:
    raw = to_bytes(forked(tmp_path / "j"), 0, 9)
    assert from_bytes(flipped(raw, len(raw) - 2 * record_size(FORK), 0), "stream").problems
    with pytest.raises(DamageError):
        from_bytes(flipped(raw, 30, 0), "stream")


def test_segments_of_a_stream_continue_each_other(tmp_path: Path) -> None:
    a, b = to_bytes(forked(tmp_path / "j"), 0, 6), to_bytes(forked(tmp_path / "k"), 7, 9)
    assert not from_bytes(a + b, "stream").whole


def test_damaged_second_header_leaves_the_first_segment(tmp_path: Path) -> None:
    raw = to_bytes(forked(tmp_path / "j"), 0, 9)
    second = raw.index(b"ZODSJRNL", 8)
    found = from_bytes(flipped(raw, second + 30, 0), "stream")
    assert found.records() == records_of(0, 6)
    assert not found.whole


# --- Written once ---

GOLDEN_WEIGHTS = "59eaa8b5336a8824d8a1323833cd2e6dcd54275626a0eb0d0bd3a17e1296cd86"
HASHED = (0, 10, 33, 50, 51, 77, 99)


def golden_base() -> dict[str, Tensor]:
    return {
        "w.weight": ((torch.arange(300 * 70) * 7 % 193 - 96) / 64).view(300, 70),
        "größe": ((torch.arange(40 * 33) * 5 % 113 - 56) / 32).bfloat16().view(40, 33),
        "w.bias": torch.arange(70) / 128,
    }


def golden_bytes(hashes: dict[int, int]) -> bytes:
    """A hundred steps, a fork in the middle."""
    base = golden_base()
    first = Header(
        run_id="5eed" * 8,
        run_seed=0x0123456789ABCDEF,
        noise=NoiseStructure.FACTORED,
        estimator="fzoo",
        num_directions=4,
        coefficient_cap=1.0,
        base_sha256=weights_sha256(base.items()),
        parameters=tuple(ParamInfo(name, tuple(t.shape), t.dtype) for name, t in base.items()),
        zo_ds="0.2.0",
        base_model={"path": "golden"},
    )
    second = replace(first, run_seed=2**64 - 3, noise=NoiseStructure.DENSE, estimator="zo_sgd")
    parts = []
    for steps in (range(50), range(50, 100)):
        records = []
        for step in steps:
            skip = SKIPS[step % 3 + 1] if step % 13 == 12 else None
            coefficients = [] if skip else [((step * 37 + slot * 29) % 101 - 50) / 16384 for slot in range(4)]
            update = Update(step, terms_of(step, coefficients, 4), 0.0 if step % 11 == 0 else 1 / 1000)
            clean, spread = (math.nan, math.inf) if skip is SkipReason.NON_FINITE else (3 - step / 64, 1 / (step + 3))
            records.append(StepRecord(update, skip, clean, spread, hashes.get(step)))
        parts.append(records)
    raw = encoded(first, parts[0])
    chain = decode_segments(raw)[0].chain
    return raw + encoded(replace(second, segment=1, first_step=50, chain=chain), parts[1])


def golden_lines(raw: bytes) -> str:
    segments = [[json.dumps(line, ensure_ascii=False) for line in as_lines(s)] for s in decode_segments(raw)]
    return "[" + ",".join("[\n" + ",\n".join(lines) + "\n]" for lines in segments) + "]\n"


def write_golden() -> None:
    hashes = replay_(golden_base(), from_bytes(golden_bytes({}), "golden"), hash_at=HASHED).hashes
    raw = golden_bytes(hashes)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "journal-v2.zoj").write_bytes(raw)
    (GOLDEN / "journal-v2.json").write_text(golden_lines(raw), encoding="utf-8")
    print("GOLDEN_WEIGHTS:", replay_(golden_base(), from_bytes(raw, "golden")).weights_sha256)


def test_golden_journal_reads_as_ever() -> None:
    raw = (GOLDEN / "journal-v2.zoj").read_bytes()
    assert golden_lines(raw) == (GOLDEN / "journal-v2.json").read_text(encoding="utf-8")
    history = read_journal(GOLDEN / "journal-v2.zoj")
    assert history.problems == ()
    assert history.steps == 100
    assert b"".join(encoded(s.header, s.records) for s in history.segments) == raw
    assert to_bytes(history, 0, 100) == raw


def test_golden_journal_gives_the_weights_of_ever() -> None:
    history = read_journal(GOLDEN / "journal-v2.zoj")
    tensors = golden_base()
    found = replay_(tensors, history, hash_at=HASHED)
    assert found.weights_sha256 == weights_sha256(tensors.items()) == GOLDEN_WEIGHTS
    assert found.hashes == {r.step: r.state_hash for r in history.records() if r.state_hash is not None}
    assert tuple(found.hashes) == HASHED


def test_golden_journal_in_two_parts() -> None:
    history = read_journal(GOLDEN / "journal-v2.zoj")
    tensors = golden_base()
    replay_(tensors, history, 61)
    late = from_bytes(to_bytes(history, 61, 100), "late")
    assert replay_(tensors, late, first=61).weights_sha256 == GOLDEN_WEIGHTS


@settings(max_examples=200)
@given(data=st.data())
def test_golden_journal_damaged(data: st.DataObject) -> None:
    raw = (GOLDEN / "journal-v2.zoj").read_bytes()
    truth = [bits(r) for s in decode_segments(raw) for r in s.records]
    at = data.draw(st.integers(0, len(raw) - 1))
    try:
        found = from_bytes(flipped(raw, at, data.draw(st.integers(0, 7))), "golden")
    except DamageError:
        return
    records = [bits(r) for r in found.records()]
    assert records == truth[: len(records)] != truth
    assert found.problems


if __name__ == "__main__" and sys.argv[1:] == ["--write-golden"]:
    write_golden()
