"""Writing snapshots beside the training: weights are read while forwards run, which never change them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from zo_ds.journal.snapshot import SnapshotInfo, purge, write_snapshot
from zo_ds.stores.base import Stored


class SnapshotWriter:
    """Writes one snapshot at a time in a thread of its own.

    Args:
        folder: of all snapshots.
        keep: how many stay.
        extras: writes the model's configuration and tokenizer into a folder.
        warn: told what went wrong; training goes on without that snapshot.
    """

    def __init__(
        self, folder: Path, keep: int, extras: Callable[[Path], None] | None, warn: Callable[[str], None]
    ) -> None:
        self._folder, self._keep, self._extras, self._warn = folder, keep, extras, warn
        self._thread: threading.Thread | None = None
        self._read = threading.Event()
        self._outcome: Path | Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, info: SnapshotInfo, tensors: Sequence[tuple[str, Tensor | Stored]]) -> None:
        """Begin a snapshot of these tensors, which must not change before `wait_until_read` returns."""
        self.finish()
        self._read.clear()
        self._thread = threading.Thread(target=self._write, args=(info, tensors), name="zo_ds snapshot", daemon=True)
        self._thread.start()

    def wait_until_read(self) -> None:
        """Return when the weights may change: at once, unless a snapshot is still reading them."""
        if self._thread is not None:
            self._read.wait()

    def finish(self) -> Path | None:
        """Wait for the snapshot under way.

        Returns:
            Its folder; None if there was none, or it failed.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if isinstance(self._outcome, Exception):
            why = getattr(self._outcome, "strerror", None) or self._outcome
            self._warn(f"no snapshot: {why}; training goes on, the journal is safe")
            return None
        return self._outcome

    def _write(self, info: SnapshotInfo, tensors: Sequence[tuple[str, Tensor | Stored]]) -> None:
        try:
            self._outcome = write_snapshot(self._folder, info, tensors, extras=self._extras, on_read=self._read.set)
            for problem in purge(self._folder, self._keep):
                self._warn(f"an old snapshot stays: {problem}")
        except Exception as error:
            self._outcome = error
        finally:
            self._read.set()
