"""One writer for each run directory."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from zo_ds.errors import MachineError

_LOCK, _OWNER = ".lock", ".owner"


class RunLock:
    """Holds a directory until `release`, or until the process ends, however it ends.

    Args:
        folder: made if it is not there.

    Raises:
        MachineError: another process holds it, or it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / _LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise MachineError(
                "the run directory is used by another process",
                where=str(folder),
                why=_owner(folder),
                remedy="wait for it or stop it, or choose another output.run_dir",
            ) from error
        except OSError as error:
            raise MachineError(
                f"cannot make the run directory: {error.strerror}",
                where=str(folder),
                remedy="choose another output.run_dir",
            ) from error
        with suppress(OSError):
            (folder / _OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        """Let others use the directory."""
        self._lock.release()

    def discard(self) -> None:
        """Release it, and undo the making of the directory if nothing else is in it."""
        (self.folder / _OWNER).unlink(missing_ok=True)
        self.release()
        (self.folder / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether a process holds a run directory now."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _owner(folder: Path) -> str:
    try:
        return (folder / _OWNER).read_text().strip()
    except OSError:
        return "its owner left no name"
