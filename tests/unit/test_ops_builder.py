"""Finding and compiling the CPU ops: every way to fail ends with the torch reference, the same bits and one cure."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zo_ds.errors import ConfigError, MachineError
from zo_ds.ops import builder, reference
from zo_ds.ops.builder import INSTRUCTION_SETS, CPUOpBuilder

COMPILER = shutil.which("c++") or shutil.which("g++")
LIBRARY = CPUOpBuilder().load()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SCRIPT = """
import pathlib, sys
from zo_ds.ops import builder
builder.PREBUILT = pathlib.Path("/nonexistent/zo_cpu.so")
import torch
from zo_ds.maths.directions import Site
from zo_ds.ops import api
theta = torch.arange(9000.0)
out = api.perturb(theta, Site(5, 3), 7, [0, 1], [0.1, 0.2])
again = api.perturb(theta, Site(5, 3), 7, [0, 1], [0.1, 0.2])
assert torch.equal(out, again)
report = builder.CPUOpBuilder().report()
print(report.active, api.state_hash(out, Site(6)), report.why, sep="|")
"""


def start(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str, list[str]]:
    """What is active, why, and the warnings; the bits must be the reference's."""
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    active, hashed, why = out.strip().split("|")
    moved, theta = torch.empty(2, 9000), torch.arange(9000.0)
    reference.perturb_(moved, theta, 7, 5, [0, 1], [0.1, 0.2], 3, 0, False)
    assert int(hashed) == int(reference.state_hash(moved, 6, 0)) % 2**64
    return active, why, log.split("no compiled CPU ops")[1:]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Nothing built, an empty cache, and only warnings logged, whatever jobs ran in this process before."""
    caplog.set_level(logging.WARNING, logger=builder.__name__)
    monkeypatch.setattr(builder, "PREBUILT", tmp_path / "package.so")
    monkeypatch.setenv("ZO_DS_CACHE", str(tmp_path))
    monkeypatch.delenv("ZO_DS_OPS", raising=False)
    return tmp_path


def load_anew() -> tuple[object | None, str]:
    return builder._load_cpu.__wrapped__()


def compile_other(target: Path, digest: str) -> None:
    """A library that says it was built from other sources."""
    source = target.with_suffix(".cpp")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(f'extern "C" const char* zo_cpu_digest(void) {{ return "{digest}"; }}')
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    target.with_suffix(".sha256").write_text(hashlib.sha256(target.read_bytes()).hexdigest())


@needs_compiler
def test_there_is_a_library_wherever_there_is_a_compiler() -> None:
    assert LIBRARY is not None, CPUOpBuilder().report().why


def test_the_reference_can_be_asked_for(tmp_path: Path) -> None:
    asked = start(ZO_DS_OPS="reference", ZO_DS_CACHE=str(tmp_path))
    assert finish(asked) == ("torch reference", "ZO_DS_OPS=reference", [])
    assert not list(tmp_path.iterdir())  # nothing was compiled either


def test_without_a_compiler_there_is_one_warning_and_the_cure(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    processes = [
        start(PATH=str(tmp_path / "bin"), CXX=cxx, ZO_DS_CACHE=str(tmp_path / "cache"), ZO_DS_OPS="auto")
        for cxx in ("/nonexistent/c++", "")
    ]
    for process, tried in zip(processes, ("/nonexistent/c++", "c++, g++, clang++"), strict=True):
        active, why, log = finish(process)
        assert active == "torch reference"
        assert why == f"there is no C++ compiler: looked for {tried}"
        assert len(log) == 1
        assert "there is no C++ compiler" in log[0]
        assert "install one (Debian: g++)" in log[0]


@needs_compiler
def test_two_processes_compile_once_between_them(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    cxx = script(tmp_path / "slow", f'echo call >> "{calls}"; exec {COMPILER} "$@" -O0')
    processes = [start(CXX=cxx, ZO_DS_CACHE=str(tmp_path / "cache"), ZO_DS_OPS="auto") for _ in range(2)]
    for active, why, log in map(finish, processes):
        assert active in INSTRUCTION_SETS
        assert why.startswith(f"compiled: {tmp_path}")
        assert log == []
    assert calls.read_text() == "call\n"


@needs_compiler
def test_a_compiler_without_openmp_will_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = 'case "$*" in *-fopenmp*) echo no openmp >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", script(fresh / "plain", f'{refuse}; exec {COMPILER} "$@" -O0'))
    library, why = load_anew()
    assert library is not None
    assert why.startswith(f"compiled: {fresh}")


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", script(fresh / "broken", "echo first >&2; echo fatal: out of cheese >&2; exit 1"))
    with caplog.at_level(logging.WARNING):
        library, why = load_anew()
    assert library is None
    assert why.startswith("the CPU ops do not compile: ")
    assert why.endswith("fatal: out of cheese")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the CPU ops do not compile" in caplog.text
    assert not list(fresh.rglob("*.so"))


def test_the_warning_quotes_the_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", script(fresh / "broken", "echo fatal: out of cheese >&2; exit 1"))
    load_anew()
    assert "out of cheese" in caplog.text


def damaged(folder: Path, keep: float) -> str:
    """A cache whose library was cut off."""
    target = folder / builder._cached().relative_to(builder.cache_dir())
    target.parent.mkdir(parents=True)
    whole = Path(LIBRARY._name).read_bytes()
    target.write_bytes(whole[: int(len(whole) * keep)])
    target.with_suffix(".sha256").write_text(hashlib.sha256(whole).hexdigest())
    return str(folder)


@pytest.mark.skipif(LIBRARY is None, reason="no compiled ops")
@pytest.mark.parametrize(
    "keep",
    [
        0.0,
        0.0005,
        0.5,
    ],
)
def test_a_damaged_library_is_not_used(tmp_path: Path, keep: float) -> None:
    active, why, log = finish(start(ZO_DS_CACHE=damaged(tmp_path, keep), ZO_DS_OPS="auto"))
    assert active == "torch reference"
    assert "cannot be loaded" in why
    assert len(log) == 1
    assert str(tmp_path) in log[0]


def test_the_cure_for_a_damaged_library_is_to_delete_it(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder._cached().parent.mkdir(parents=True)
    builder._cached().write_bytes(b"no library")
    assert load_anew()[0] is None
    assert "delete" in caplog.text
    assert "install" not in caplog.text


@needs_compiler
def test_a_library_of_other_sources_is_not_used(fresh: Path) -> None:
    compile_other(builder._cached(), "0123456789abcdef")
    library, why = load_anew()
    assert library is None
    assert "cannot be loaded" in why
    compile_other(fresh / "package.so", builder.source_digest())  # right
    assert load_anew()[1] == f"in the package: {fresh / 'package.so'}"


@needs_compiler
def test_an_old_library_in_the_package_is_passed_over(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_other(fresh / "package.so", "0123456789abcdef")
    compile_other(builder._cached(), builder.source_digest())
    assert load_anew()[1] == f"compiled: {builder._cached()}"


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("ZO_DS_CACHE", str(fresh / "file"))
    monkeypatch.setenv("CXX", sys.executable)  # any program: it is not reached
    library, why = load_anew()
    assert library is None
    assert "cannot prepare" in why
    assert len(caplog.records) == 1


def test_is_compatible(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert not CPUOpBuilder().is_compatible()
    assert not caplog.records
    assert not CPUOpBuilder().is_compatible(verbose=True)
    assert "no C++ compiler" in caplog.text
    monkeypatch.setenv("CXX", script(fresh / "cxx", "exit 1"))
    assert CPUOpBuilder().is_compatible()


@pytest.mark.parametrize("name", ["avx1024", "Reference", "cuda"])
def test_unknown_ops_are_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ZO_DS_OPS", name)
    with pytest.raises(ConfigError, match=f"no ops named '{name}'") as caught:
        load_anew()
    assert caught.value.where == "ZO_DS_OPS"
    assert "auto, reference, scalar, avx2, avx512" in caught.value.why


def test_an_instruction_set_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for best, name in enumerate(INSTRUCTION_SETS):
        # A processor that there is only one of here; the number is all that is asked of the library.
        library = SimpleNamespace(zo_cpu_best_isa=lambda best=best: best)
        monkeypatch.setattr(CPUOpBuilder, "load", lambda _, library=library: library)
        monkeypatch.setenv("ZO_DS_OPS", "auto")
        assert builder.instruction_set.__wrapped__() == best
        for number, wanted in enumerate(INSTRUCTION_SETS):
            monkeypatch.setenv("ZO_DS_OPS", wanted)
            if number <= best:
                assert builder.instruction_set.__wrapped__() == number
            else:
                with pytest.raises(MachineError, match=f"no {wanted}") as caught:
                    builder.instruction_set.__wrapped__()
                assert f"ZO_DS_OPS={name};" in caught.value.remedy
