"""The journal says what happened or that it is damaged; it never says something else."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zo_ds.errors import CorruptRunError, DataError, MachineError
from zo_ds.journal.journal import Journal, read_journal
from zo_ds.journal.records import Header, StepRecord
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.update import Term, Update

HEADER = Header(
    run_id="00ff",
    run_seed=2**64 - 1,
    noise=NoiseStructure.FACTORED,
    estimator="fzoo",
    base_sha256="ab" * 32,
    parameters=(
        ParamInfo("a.weight", (3, 5), torch.bfloat16),
        ParamInfo("größe", (7,), torch.float32),
        ParamInfo("s", (), torch.float16),
    ),
    zo_ds="0.1.0",
)
RECORDS = [
    StepRecord(Update(0, (Term(0, 0, 0.5), Term(0, 1, -1.5)), 0.1), None, 2.25, 0.125),
    StepRecord(Update(1, ()), SkipReason.NON_FINITE, math.nan, math.inf),
    StepRecord(Update(2, (Term(1, 7, 2.0**-149), Term(2, 0, -0.0)), 1e-300), None, 0.1, 1 / 3),
]


def write(path: Path, records: list[StepRecord] = RECORDS) -> Path:
    journal = Journal(path, HEADER)
    for record in records:
        journal.append(record)
    journal.close()
    return path


def plain(records: list[StepRecord]) -> list[dict[str, Any]]:
    """Comparable, nan included, and -0.0 told apart from 0.0."""
    return [record.to_json() for record in records]


def line(tree: Any, chain: int) -> tuple[bytes, int]:
    """A line of the format as documented, written independently."""
    body = json.dumps(tree, separators=(",", ":")).encode()[:-1]
    chain = zlib.crc32(body, chain)
    return body + b',"crc":"%08x"}\n' % chain, chain


def crafted(path: Path, *trees: Any) -> Path:
    """A journal whose checksums are right, whatever it says."""
    raw, chain = b"", 0
    for tree in trees:
        text, chain = line(tree, chain)
        raw += text
    path.write_bytes(raw)
    return path


def test_round_trip(tmp_path: Path) -> None:
    contents = read_journal(write(tmp_path / "j"))
    assert contents.header == HEADER
    assert plain(contents.records) == plain(RECORDS)
    assert contents.records[0] == RECORDS[0]
    assert contents.records[2] == RECORDS[2]
    assert [record.step for record in contents.records] == [0, 1, 2]
    assert contents.sound_bytes == (tmp_path / "j").stat().st_size


def test_format_is_frozen(tmp_path: Path) -> None:
    versions = {"journal_version": 1, "noise_version": 1, "update_version": 1, "zo_ds": "0.1.0"}
    run = {"run_id": "00ff", "run_seed": 2**64 - 1, "noise": "factored", "estimator": "fzoo", "base_sha256": "ab" * 32}
    manifest = [
        {"name": "a.weight", "shape": [3, 5], "dtype": "bfloat16", "param_id": 251399155},
        {"name": "größe", "shape": [7], "dtype": "float32", "param_id": 1738691539},
        {"name": "s", "shape": [], "dtype": "float16", "param_id": 2272344580},
    ]
    keys = ("step", "skip", "terms", "decay", "clean_loss", "spread")
    records = [
        (0, None, [[0, 0, "3f000000"], [0, 1, "bfc00000"]], 0.1, 2.25, 0.125),
        (1, "non_finite_loss", [], 0.0, "nan", "inf"),
        (2, None, [[1, 7, "00000001"], [2, 0, "80000000"]], 1e-300, 0.1, 1 / 3),
    ]
    header = {"format": "zo_ds journal", **versions, **run, "parameters": manifest}
    frozen = crafted(tmp_path / "frozen", header, *(dict(zip(keys, r, strict=True)) for r in records))
    assert write(tmp_path / "j").read_bytes() == frozen.read_bytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    coefficients=st.lists(st.floats(width=32, allow_nan=False), max_size=9),
    decay=st.floats(0, 1),
    clean=st.floats(),
    spread=st.floats(),
)
def test_every_bit_of_every_float_comes_back(
    tmp_path: Path, coefficients: list[float], decay: float, clean: float, spread: float
) -> None:
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    terms = tuple(Term(0, i, c) for i, c in enumerate(coefficients))
    write(path, [StepRecord(Update(0, terms, decay), None, clean, spread)])
    (record,) = read_journal(path).records
    found = [t.coefficient for t in record.update.terms]
    assert struct.pack(f">{len(found)}f", *found) == struct.pack(f">{len(coefficients)}f", *coefficients)
    for value, wanted in ((record.update.decay, decay), (record.clean_loss, clean), (record.spread, spread)):
        assert math.isnan(value) if math.isnan(wanted) else struct.pack("d", value) == struct.pack("d", wanted)


def test_truncation_anywhere_gives_whole_records_or_an_error(tmp_path: Path) -> None:
    raw = write(tmp_path / "j").read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    cut = tmp_path / "cut"
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        whole = sum(end <= length for end in ends)
        if whole == 0:
            with pytest.raises(CorruptRunError, match="header is incomplete"):
                read_journal(cut)
            continue
        contents = read_journal(cut)
        assert plain(contents.records) == plain(RECORDS[: whole - 1])
        assert contents.sound_bytes == ends[whole - 1]


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def test_no_flipped_bit_gives_another_record(tmp_path: Path) -> None:
    raw = write(tmp_path / "j").read_bytes()
    bad, wanted = tmp_path / "bad", plain(RECORDS)
    last_line = raw.rindex(b"\n", 0, -1)
    cuts = 0
    for at in range(len(raw)):
        for bit in range(8):
            bad.write_bytes(flipped(raw, at, bit))
            try:
                found = plain(read_journal(bad).records)
            except CorruptRunError:
                assert at <= last_line or b"\n" in flipped(raw, at, bit)[at : at + 1]
                continue
            assert at >= last_line
            assert found == wanted[: len(found)]
            assert len(found) == len(wanted) - (2 if at == last_line else 1)
            cuts += 1
    assert cuts > 0


def test_two_lines_run_together_are_corruption(tmp_path: Path) -> None:
    raw = write(tmp_path / "j").read_bytes()
    (tmp_path / "bad").write_bytes(flipped(raw, raw.rindex(b"\n", 0, -1), 0))
    with pytest.raises(CorruptRunError):
        read_journal(tmp_path / "bad")


def test_reordered_repeated_or_dropped_lines_are_corruption(tmp_path: Path) -> None:
    head, *lines = write(tmp_path / "j").read_bytes().splitlines(keepends=True)
    for order in ([1, 0, 2], [0, 0, 1, 2], [0, 2, 1], [1, 2], [0, 1, 1, 2]):
        (tmp_path / "bad").write_bytes(head + b"".join(lines[i] for i in order))
        with pytest.raises(CorruptRunError, match="checksum") as caught:
            read_journal(tmp_path / "bad")
        assert caught.value.where.startswith(f"{tmp_path / 'bad'}:")


RECORD = RECORDS[0].to_json()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"step": 1}, "step 1 follows step -1"),
        ({"step": "x"}, "invalid literal"),
        ({"skip": "bored"}, "bored"),
        ({"terms": [[0, 0]]}, "unpack"),
        ({"terms": [[0, 0, "zz"]]}, "hexadecimal"),
        ({"terms": None}, "iterable"),
        ({"decay": None}, "float"),
        ({"terms": [[0, 0, "3f00"]]}, "bytes"),
    ],
)
def test_malformed_record_with_a_right_checksum(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = crafted(tmp_path / "j", HEADER.to_json(), {**RECORD, **change})
    with pytest.raises(CorruptRunError) as caught:
        read_journal(path)
    assert why in caught.value.why
    assert caught.value.where == f"{path}:2"


def test_gap_and_repetition_of_steps(tmp_path: Path) -> None:
    for second, why in ((2, "step 2 follows step 0"), (0, "step 0 follows step 0")):
        path = crafted(tmp_path / "j", HEADER.to_json(), RECORD, {**RECORD, "step": second})
        with pytest.raises(CorruptRunError, match=why):
            read_journal(path)


@pytest.mark.parametrize("key", ["journal_version", "noise_version", "update_version"])
def test_unknown_version_is_named(tmp_path: Path, key: str) -> None:
    path = crafted(tmp_path / "j", {**HEADER.to_json(), key: 2})
    with pytest.raises(CorruptRunError, match=f"{key} is 2, this zo_ds reads 1"):
        read_journal(path)


def test_header_of_something_else(tmp_path: Path) -> None:
    for tree, why in (
        ({"format": "other"}, "does not start with a zo_ds journal header"),
        ({k: v for k, v in HEADER.to_json().items() if k != "run_seed"}, "run_seed"),
        ({**HEADER.to_json(), "parameters": [{"name": "a", "shape": [1], "dtype": "float33"}]}, "float33"),
    ):
        with pytest.raises(CorruptRunError, match=why):
            read_journal(crafted(tmp_path / "j", tree))
    (tmp_path / "j").write_bytes(b"{}\n")
    with pytest.raises(CorruptRunError, match="checksum"):
        read_journal(tmp_path / "j")


def test_no_journal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no journal: No such file"):
        read_journal(tmp_path / "none")


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "j")
    with pytest.raises(MachineError, match="cannot start a journal: File exists"):
        Journal(path, HEADER)
    with pytest.raises(MachineError, match="cannot start a journal: No such file"):
        Journal(tmp_path / "missing" / "j", HEADER)
    assert plain(read_journal(path).records) == plain(RECORDS)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_loses_nothing_and_writing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    journal.append(RECORDS[0])
    sound = (tmp_path / "j").read_bytes()
    real, left = os.write, [10]

    def half(handle: int, data: bytes) -> int:
        if call == "write" and left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(handle, data[: left[0]])
        left[0] -= taken if call == "write" else 0
        return taken

    def no_sync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        if call == "fsync":
            patch.setattr(os, "fsync", no_sync)
        with pytest.raises(MachineError, match="cannot write the journal: No space left"):
            journal.append(RECORDS[1])
    assert (tmp_path / "j").read_bytes() == sound
    for record in RECORDS[1:]:
        journal.append(record)
    journal.close()
    assert plain(read_journal(tmp_path / "j").records) == plain(RECORDS)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    assert plain(read_journal(write(tmp_path / "j")).records) == plain(RECORDS)
