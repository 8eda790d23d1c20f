"""What makes the steps of an engine last: its journal, snapshots when replay would take long, checks of the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from zo_ds.config.schema import JournalConfig
from zo_ds.engine.audit import Auditor
from zo_ds.engine.export import every_entry_read
from zo_ds.engine.snapshots import SnapshotWriter
from zo_ds.errors import MachineError
from zo_ds.journal.history import Stretch
from zo_ds.journal.journal import Journal
from zo_ds.journal.records import StepRecord
from zo_ds.journal.snapshot import SnapshotInfo, folder_of
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.layout import Layout, agreed_total
from zo_ds.stores.base import WeightStore


class Durability:
    """Keeps the record of a run; rank 0 writes, every rank checks.

    Args:
        store: the weights.
        channel: to the other ranks.
        layout: which of them hold the weights together.
        settings: how often what is done.
        journal: on rank 0; None on the others.
        snapshots: folder for them.
        newest: the snapshot that the run went on from, if any.
        since: what was replayed since.
        replay_s: how long that took.
        extras: writes the model's configuration and tokenizer into a folder; not used if a part of it is frozen.
        warn: told what went wrong.
        patience: entered while something may take as long as setting up.
    """

    def __init__(
        self,
        store: WeightStore,
        channel: Channel,
        layout: Layout,
        settings: JournalConfig,
        journal: Journal | None,
        snapshots: Path,
        *,
        newest: Path | None = None,
        since: list[Stretch] | None = None,
        replay_s: float = 0.0,
        extras: Callable[[Path], None] | None = None,
        warn: Callable[[str], None] = lambda text: None,
        patience: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.journal, self._patience = journal, patience
        self._store, self._channel, self._layout, self._settings, self._warn = store, channel, layout, settings, warn
        # Beside a part of the weights, a configuration would make it look like a model.
        self._writer = SnapshotWriter(snapshots, settings.keep_snapshots, None if store.partial else extras, warn)
        self._auditor = Auditor(store, warn)
        self._newest, self._since = newest, list(since or [])
        self._pending: list[StepRecord] = []
        self._replay_s = replay_s

    def state_hash(self, step: int) -> int | None:
        """Hash of the weights that a step starts from, if it is due; collective.

        Raises:
            PeerError: the ranks hold different weights.
        """
        if step % self._settings.hash_every:
            return None
        what = f"the weights before step {step}"
        found = agreed_total(self._channel, self._layout, self._store.state_hash(), what)
        # Only weights that all ranks agree on are worth a snapshot.
        due = self.journal is not None and self._replay_s > self._settings.snapshot_replay_s and not self._writer.busy
        if self._together:
            with self._patience():
                self._snapshot_together(found, due)
        elif due:
            self.snapshot(found)
        return found

    @property
    def _together(self) -> bool:
        """Whether it takes other ranks to read the weights; all ranks find the same."""
        return self._layout.lockstep

    def _snapshot_together(self, state_hash: int, due: bool) -> None:
        info = self._prepare(state_hash) if due else None
        if not bool(self._channel.all_gather(torch.tensor([info is not None]))[0]):
            return
        if info is not None:
            with every_entry_read(self._store, frozen=not self._store.partial) as entries:
                self._writer.start(info, entries)
                self._writer.wait_until_read()
        elif self._layout.replica == 0:
            self._store.take_part(frozen=not self._store.partial)
        self._channel.barrier()

    def commit(self, record: StepRecord) -> None:
        """Make a step durable. Until then nobody may apply it.

        Raises:
            MachineError: the disk refused it.
        """
        if self.journal is not None:
            self.journal.append(record)

    def before_apply(self) -> None:
        """Return when the weights may change."""
        self._writer.wait_until_read()

    def applied(self, record: StepRecord, seconds: float) -> None:
        """Take note of a step that is done, and do what has become due.

        Args:
            record: the step.
            seconds: that applying it took, which is an upper bound of what replaying it will take.
        """
        if self.journal is None:
            return
        self._pending.append(record)
        self._replay_s += seconds
        if not self._writer.busy:
            self._take_note(self._writer.finish())
        due = (record.step + 1) % self._settings.audit_every == 0
        if due and self._newest is not None and not self._writer.busy and self._newest.is_dir():
            self._auditor.audit(self._newest, [*self._since, Stretch(self.journal.header, tuple(self._pending))])

    def snapshot(self, state_hash: int | None = None) -> None:
        """Begin a snapshot of the weights as they are now.

        Args:
            state_hash: of these weights, if it is known.
        """
        if self._together:
            self._snapshot_together(self._whole_hash() if state_hash is None else state_hash, self.journal is not None)
            return
        info = self._prepare(state_hash)
        if info is not None:
            self._writer.start(info, self._store.views(frozen=not self._store.partial))

    def _whole_hash(self) -> int:
        return agreed_total(self._channel, self._layout, self._store.state_hash(), "the weights")

    def _prepare(self, state_hash: int | None) -> SnapshotInfo | None:
        """Give the snapshot that is to begin its place in the journal; None if there shall be none."""
        if self.journal is None:
            return None
        self._replay_s = 0.0
        self._take_note(self._writer.finish())
        if (
            self._newest is not None
            and self._newest.name == folder_of(self._newest.parent, self.journal.next_step).name
        ):
            return None
        before = self.journal.header
        try:
            self.journal.rotate()
        except MachineError as error:
            self._warn(f"no snapshot: {error.what}; training goes on, the journal is safe")
            return None
        self._since.append(Stretch(before, tuple(self._pending)))
        self._pending = []
        return SnapshotInfo(
            self.journal.header.run_id,
            self.journal.next_step,
            self._store.state_hash() if state_hash is None else state_hash,
            *self.journal.position,
        )

    def wait(self) -> None:
        """Return when the snapshot under way is on disk."""
        self._take_note(self._writer.finish())

    @property
    def repaired(self) -> int:
        """Blocks of the weights that audits had to put right."""
        return self._auditor.repaired

    def close(self) -> None:
        """Finish what is under way and close the journal.

        Raises:
            MachineError: the disk refused the last records.
        """
        self._writer.finish()
        if self.journal is not None:
            self.journal.close()

    def _take_note(self, finished: Path | None) -> None:
        if finished is not None:
            self._newest, self._since = finished, []
