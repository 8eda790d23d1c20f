"""Safetensors files: every tensor as the library reads it, any part of it, and nothing at all from a damaged file."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from zo_ds import tensor_files
from zo_ds.errors import DataError
from zo_ds.tensor_files import TensorFiles, folder_files

pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return values > 0 if dtype == torch.bool else values.to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


@settings(max_examples=60)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=5), st.data())
def test_any_part_of_any_tensor_in_any_dtype(kinds: list[tuple[Any, torch.dtype]], data: st.DataObject) -> None:
    wanted = {f"layer.{n}": tensor_of(shape, dtype, n) for n, (shape, dtype) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(wanted, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        files = TensorFiles([Path(folder) / "model.safetensors"])
        found = dict(files.tensors())
        assert found.keys() == wanted.keys()
        assert all(same(found[name], wanted[name]) for name in wanted)
        name = data.draw(st.sampled_from(sorted(wanted)))
        flat = wanted[name].view(-1)
        start = data.draw(st.integers(0, flat.numel()))
        count = data.draw(st.integers(0, flat.numel() - start))
        dtype = data.draw(st.sampled_from([flat.dtype, *FLOATS]))
        out = torch.full((count + 2,), 7, dtype=dtype)
        files.read(name, start, out[1 : 1 + count])
        assert same(out[1 : 1 + count], flat[start : start + count].to(dtype))
        assert out[0] == out[-1] == torch.tensor(7, dtype=dtype)
        files.close()


@pytest.mark.parametrize("block", [8, 24, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_conversion_goes_block_by_block(
    dtype: torch.dtype, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block)
    values = tensor_of((7, 13), dtype)
    save_file({"w": values}, tmp_path / "model.safetensors")
    files = TensorFiles([tmp_path / "model.safetensors"])
    for target in FLOATS:
        out = torch.empty(80, dtype=target)
        files.read("w", 5, out)
        assert same(out, values.view(-1)[5:85].to(target))
        strided = torch.zeros(160, dtype=target)[::2]
        files.read("w", 5, strided)
        assert same(strided, out)


def test_a_name_in_several_files_is_the_last_ones(tmp_path: Path) -> None:
    for number in range(3):
        save_file(
            {"both": torch.full((2,), float(number)), f"own{number}": torch.ones(1)}, tmp_path / f"{number}.safetensors"
        )
    files = folder_files(tmp_path)
    assert files.tensor("both").tolist() == [2, 2]
    assert sorted(files.entries) == ["both", "own0", "own1", "own2"]
    backwards = TensorFiles([tmp_path / f"{number}.safetensors" for number in (2, 1, 0)])
    assert backwards.tensor("both").tolist() == [0, 0]


def test_empty_tensors_files_and_lists(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 3), "one": torch.tensor(4.0)}, tmp_path / "a.safetensors")
    save_file({}, tmp_path / "b.safetensors")
    files = folder_files(tmp_path)
    assert (files.tensor("none").shape, files.tensor("one").shape) == ((0, 3), ())
    files.read("none", 0, torch.zeros(0, dtype=torch.bfloat16))
    assert dict(TensorFiles([]).tensors()) == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        folder_files(tmp_path / "empty")
    assert caught.value.where == str(tmp_path / "empty")


def test_an_unknown_name(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(KeyError):
        folder_files(tmp_path).tensor("v")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "good.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(DataError) as caught:
            TensorFiles([tmp_path / "good.safetensors", path])
        assert (caught.value.exit_code, caught.value.where) == (3, str(path))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes whose numbers look like others when a digit is damaged."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_file(
        {"a": tensor_of((3, 4), torch.float32), "b": tensor_of((5,), torch.bfloat16), "none": torch.ones(0)}, path
    )
    return path


def outcome(path: Path, raw: bytes) -> dict[str, Tensor] | None:
    """What is read from a file with these bytes; None if it is refused, in which case the message names it."""
    path.write_bytes(raw)
    try:
        files = TensorFiles([path])
        return dict(files.tensors())
    except DataError as error:
        refused = error
    assert refused.where == str(path)
    assert refused.remedy
    return None


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    assert outcome(tmp_path / "cut.safetensors", raw) is not None
    for length in range(len(raw)):
        assert outcome(tmp_path / "cut.safetensors", raw[:length]) is None, length


def test_a_file_that_shrinks_while_it_is_open(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(small.read_bytes())
    files = TensorFiles([path])
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(DataError, match="cut off") as caught:
        for _ in files.tensors():
            pass
    assert caught.value.where == str(path)


def library(path: Path) -> dict[str, Tensor] | None:
    """What the safetensors library makes of a file."""
    try:
        return load_file(path)
    except Exception:
        return None


def check_header_damage(small: Path, target: Path, change: Callable[[int], set[int]], places: range) -> None:
    """A damaged header is refused, or says something else that the library reads alike."""
    raw = small.read_bytes()
    for at in places:
        for byte in change(raw[at]) - {raw[at]}:
            found = outcome(target, raw[:at] + bytes([byte]) + raw[at + 1 :])
            if found is None:
                continue
            wanted = library(target)
            assert wanted is not None, f"byte {at} -> {byte}: read, though the file is damaged"
            assert found.keys() == wanted.keys()
            assert all(same(found[name], wanted[name]) for name in found)


def header(path: Path) -> range:
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    return range(8, 8 + length)


def test_damage_in_the_header(small: Path, tmp_path: Path) -> None:
    check_header_damage(small, tmp_path / "bad.safetensors", lambda byte: {byte ^ 1, *b'e "'}, header(small))


def test_damage_in_the_length_of_the_header(small: Path, tmp_path: Path) -> None:
    assert small.read_bytes()[header(small).stop - 1] == ord(" ")
    check_header_damage(small, tmp_path / "bad.safetensors", lambda byte: set(range(256)), range(8))


def written(path: Path, tree: Any, data: bytes = bytes(64)) -> Path:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "tree",
    [
        [],
        7,
        "text",
        {"w": 3},
        {"w": {}},
        {"w": None},
        entry(dtype="F8_E5M2"),
        entry(dtype=["F32"]),
        entry(shape=4),
        entry(shape=["x"]),
        entry(shape=[5]),
        entry(shape=[2**62, 4]),
        entry(offsets=[0]),
        entry(offsets=[0, 16, 16]),
        entry(offsets=[-16, 0]),
        entry(offsets=[16, 0]),
        entry(offsets=[56, 72]),
        entry(offsets=None),
        entry(offsets="ab"),
        b'{"w": {"dtype": "F32"',
        b"\xff\xfe",
        entry(shape=[math.inf]),
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1e384]}}',
        entry(shape=[-2, -2]),
        entry(shape=[4.5]),
        b"[" * 100_000,
    ],
    ids=lambda tree: str(tree)[:40],
)
def test_headers_that_make_no_sense(tree: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "odd.safetensors", tree)
    assert library(path) is None
    with pytest.raises(DataError) as caught:
        dict(TensorFiles([path]).tensors())
    assert caught.value.where == str(path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_lengths_that_make_no_sense(length: int, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(20))
    with pytest.raises(DataError, match="does not begin with a header"):
        TensorFiles([path])


def test_a_part_beyond_the_end_is_not_the_next_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises((ValueError, IndexError, DataError)):
        folder_files(tmp_path).read("a", 2, torch.zeros(4))
