"""Finds or compiles the op libraries, after the pattern of DeepSpeed's OpBuilder: `is_compatible`, `load`, `report`."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from zo_ds.errors import ConfigError, MachineError
from zo_ds.fetch import build_once, cache_dir
from zo_ds.ops.sources import COMPILERS, CompileError, compile_cpu, compiler, source_digest

_log = logging.getLogger(__name__)

PREBUILT = Path(__file__).parent / "zo_cpu.so"
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")
"""What the CPU library holds, by its own numbers 0, 1, 2."""
WITHOUT = "set ZO_DS_OPS=reference to go on without compiled ops"
CHOICES = ("auto", "reference", *INSTRUCTION_SETS)


@dataclass(frozen=True)
class Report:
    """What `zo_ds doctor` prints of one op library.

    Attributes:
        name: of the library.
        active: what runs: an instruction set, a GPU architecture, or the torch reference.
        why: where it comes from, or what stands in the way.
    """

    name: str
    active: str
    why: str


class OpBuilder(ABC):
    """One library of ops."""

    NAME = ""

    @abstractmethod
    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether this machine can load the library or build it; verbose: log what is missing."""

    @abstractmethod
    def load(self) -> object | None:
        """The library, or None if it cannot be had. Nothing is tried twice in a process."""

    @abstractmethod
    def report(self) -> Report:
        """What is active and why; loads the library."""


def choice() -> str:
    """The environment's ``ZO_DS_OPS``: auto (default), reference (torch only), or a CPU instruction set.

    Raises:
        ConfigError: it is something else.
    """
    wanted = os.environ.get("ZO_DS_OPS") or "auto"
    if wanted not in CHOICES:
        raise ConfigError(
            f"there are no ops named {wanted!r}",
            where="ZO_DS_OPS",
            why=f"known: {', '.join(CHOICES)}",
            remedy="unset it, or set it to one of these",
        )
    return wanted


class CPUOpBuilder(OpBuilder):
    """The SIMD library: from the wheel, from the cache, or compiled now."""

    NAME = "zo_cpu"

    def is_compatible(self, verbose: bool = False) -> bool:
        """True with a library from the wheel or the cache, or with a compiler."""
        compatible = bool(_matching(PREBUILT) or compiler() or _cached().exists())
        if verbose and not compatible:
            _log.warning("%s: no library in the package or cache, and no C++ compiler", self.NAME)
        return compatible

    def load(self) -> ctypes.CDLL | None:
        """The library, compiled into the cache if need be; logs one warning if there is none."""
        return _load_cpu()[0]

    def report(self) -> Report:
        """The instruction set in use, or why it is the reference."""
        library, why = _load_cpu()
        return Report(self.NAME, "torch reference" if library is None else INSTRUCTION_SETS[instruction_set()], why)


@cache
def _load_cpu() -> tuple[ctypes.CDLL | None, str]:
    if choice() == "reference":
        return None, "ZO_DS_OPS=reference"
    if prebuilt := _matching(PREBUILT):
        return prebuilt, f"in the package: {PREBUILT}"
    try:
        cached = _cached()
        if not cached.exists():
            command = compiler()
            if command is None:
                looked = os.environ.get("CXX") or ", ".join(COMPILERS)
                raise MachineError(
                    "there is no C++ compiler",
                    why=f"looked for {looked}",
                    remedy="install one (Debian: g++), or set CXX",
                )
            _log.info("compiling the CPU ops with %s, once", command)
            build_once(cached.parent, lambda folder: _compile(folder / cached.name, command))
        library = _matching(cached) if _is_intact(cached) else None
        if library is None:
            raise MachineError(
                "the library of CPU ops is damaged or from another machine",
                where=str(cached),
                why="it cannot be loaded",
                remedy=f"delete {cached.parent}; it will be compiled again",
            )
        return library, f"compiled: {cached}"
    except MachineError as error:
        _log.warning("no compiled CPU ops: perturbations and updates run in torch, 10 to 60 times slower\n%s", error)
        return None, ": ".join(filter(None, (error.what, error.where, error.why)))


def _compile(target: Path, command: str) -> None:
    try:
        compile_cpu(target, command)
    except CompileError as error:
        raise MachineError(
            "the CPU ops do not compile",
            where=command,
            why=str(error),
            remedy="set CXX to another compiler (g++ 9 or later, clang++ 12 or later)",
        ) from error
    _checksum(target).write_text(hashlib.sha256(target.read_bytes()).hexdigest(), encoding="ascii")


def _checksum(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_intact(library: Path) -> bool:
    """Loading half a library would kill the process."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == _checksum(library).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _cached() -> Path:
    return cache_dir() / "ops" / f"zo_cpu-{platform.machine()}-{source_digest()}" / "zo_cpu.so"


def _matching(path: Path) -> ctypes.CDLL | None:
    """The library at a path, if it loads and was built from the present sources."""
    try:
        library = ctypes.CDLL(str(path))
        library.zo_cpu_digest.restype = ctypes.c_char_p
        found = library.zo_cpu_digest()
    except (OSError, AttributeError):
        return None
    return library if found == source_digest().encode() else None


@cache
def instruction_set() -> int:
    """Number of the CPU instruction set in use: ``ZO_DS_OPS``, else the best one of this machine.

    Raises:
        MachineError: this machine lacks the one asked for.
    """
    library = CPUOpBuilder().load()
    if library is None:
        raise MachineError("there are no compiled CPU ops", remedy="see `zo_ds doctor`")
    best, wanted = int(library.zo_cpu_best_isa()), choice()
    if wanted == "auto":
        return best
    if INSTRUCTION_SETS.index(wanted) > best:
        raise MachineError(
            f"this processor has no {wanted}",
            where="ZO_DS_OPS",
            remedy=f"the best it can do is ZO_DS_OPS={INSTRUCTION_SETS[best]}; auto chooses that",
        )
    return INSTRUCTION_SETS.index(wanted)
