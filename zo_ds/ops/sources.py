"""The C++ sources of the ops and how they are compiled. Standard library only: setup.py reads this file too."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi"]
"""No fused multiply-add, and nothing that the building machine has and others may not."""
COMPILERS = ("c++", "g++", "clang++")
_LINES_SHOWN = 6


class CompileError(RuntimeError):
    """The compiler failed; the message holds its last lines."""


def source_digest() -> str:
    """SHA-256 of the sources and flags, 16 hexadecimal digits: a library built from others is not used."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> str | None:
    """Path of the C++ compiler: ``$CXX``, else the first of c++, g++, clang++ on the PATH."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for path in map(shutil.which, names) if path), None)


def compile_cpu(target: Path, command: str) -> None:
    """Compile the CPU library to a file.

    Args:
        target: the file.
        command: the compiler.

    Raises:
        CompileError: the compiler failed.
    """
    arguments = [command, *FLAGS, f'-DZO_DIGEST="{source_digest()}"', str(SOURCES / "zo_cpu.cpp"), "-o", str(target)]
    output = ""
    # Without OpenMP's run-time library one thread is better than none.
    for openmp in (["-fopenmp"], []):
        result = subprocess.run([*arguments, *openmp], capture_output=True, text=True, errors="replace", check=False)
        if result.returncode == 0:
            return
        output = result.stderr
    raise CompileError("\n".join(output.splitlines()[-_LINES_SHOWN:]))
