"""A guard beside the training: a hang ends the process with stacks, a signal lets it finish its step and stop.

Both must work while the main thread waits for a dead peer inside a collective, where Python runs no signal handler:
so a thread of its own watches a clock and the pipe that the interpreter's C handler writes signals to.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import psutil
import torch

from zo_ds.errors import HungError, StoppedError
from zo_ds.parallel.channel import Channel

GRACE_S = 20.0
"""How long a step may go on after a signal; launchers kill after 30 s."""
_ECHO_S = 3.0
"""A launcher passes on what the whole process group has had already: that is no second signal."""
_RECENT = 20
log = logging.getLogger("zo_ds")


class Guard:
    """Watches this process from `__enter__` to `__exit__`.

    Args:
        peers: processes of the other ranks on this host.
        hang_s: least time without progress that counts as a hang; also 10 times the longest recent step.
        set_up_s: the same before the first few steps.
        launched: the parent is a launcher, without which the job should not go on.
        stacks: file that stack traces go to, beside the screen.
    """

    def __init__(
        self, peers: Sequence[int], hang_s: float, set_up_s: float, *, launched: bool, stacks: Path | None = None
    ) -> None:
        self._peers, self._hang_s, self._set_up_s = peers, hang_s, set_up_s
        self._file: IO[str] | None = stacks.open("a", encoding="utf-8") if stacks is not None else None
        self._beats: list[float] = []
        self._last = time.monotonic()
        self._stop_at: float | None = None
        self._done = threading.Event()
        self._launcher = os.getppid() if launched else None
        self._patient = False
        self._thread = threading.Thread(target=self._watch, name="zo_ds guard", daemon=True)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked the run to stop."""
        return self._stop_at is not None

    def beat(self) -> None:
        """Say that there is progress.

        Raises:
            StoppedError: a signal asked the run to stop.
        """
        self.progress()
        if self.stop_requested:
            raise StoppedError("stopped, as asked", remedy="the same command goes on, from the journal if there is one")

    @contextmanager
    def patience(self) -> Iterator[None]:
        """For what may take as long as setting up: loading and saving a whole model."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
            self._last = time.monotonic()

    def progress(self) -> None:
        """Say that there is progress."""
        now = time.monotonic()
        self._beats = [*self._beats[-_RECENT:], now - self._last]
        self._last = now

    def __enter__(self) -> Guard:
        """Start watching, and catch SIGTERM and SIGINT."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if self._file is not None:
            faulthandler.register(signal.SIGUSR1, self._file, all_threads=True)
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None:
            faulthandler.unregister(signal.SIGUSR1)
        self._done.set()
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        if self._file is not None:
            self._file.close()

    def _watch(self) -> None:
        while not self._done.is_set():
            ready, _, _ = select.select([self._read], [], [], 0.5)
            if self._done.is_set():
                return
            if ready:
                self._take_signals(os.read(self._read, 64))
            if self._launcher is not None and os.getppid() != self._launcher and self._stop_at is None:
                log.warning("the launcher is gone")
                self._request_stop()
            now = time.monotonic()
            if self._stop_at is not None and now > self._stop_at:
                log.warning("stopping in the middle of a step, which is abandoned")
                self._leave(StoppedError.exit_code)
            if now - self._last > self._limit():
                self._give_up(now - self._last)

    def _take_signals(self, raw: bytes) -> None:
        for number in raw:
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self._stop_at is not None:
                if self._stop_at - time.monotonic() > GRACE_S - _ECHO_S:
                    continue
                log.warning("a second signal: stopping at once")
                self._leave(StoppedError.exit_code)
            log.warning("%s", f"{signal.Signals(number).name}: finishing this step, then stopping (again: at once)")
            self._request_stop()

    def _request_stop(self) -> None:
        self._stop_at = time.monotonic() + GRACE_S

    def _limit(self) -> float:
        if self._patient or len(self._beats) < 3:
            return max(self._set_up_s, self._hang_s)
        return max(self._hang_s, 10 * max(self._beats[1:]))

    def _give_up(self, silence: float) -> None:
        error = HungError(
            f"no progress for {silence:.0f} s",
            where=f"process {os.getpid()}",
            why="this rank or one that it waits for hangs; the stacks of all threads are in the log",
            remedy="the journal is safe: the same command goes on (launch/supervise.sh does it by itself)",
        )
        log.error("%s", error)
        print(f"zo_ds: {error}", file=sys.stderr, flush=True)
        for file in (self._file, sys.stderr):
            if file is not None:
                faulthandler.dump_traceback(file, all_threads=True)
        kill_stopped(self._peers)
        self._leave(HungError.exit_code)

    def _leave(self, code: int) -> None:
        with suppress(Exception):
            logging.shutdown()
        os._exit(code)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The guard's thread has seen it; without a Python handler the interpreter would not write to the pipe."""


def local_peers(channel: Channel) -> list[int]:
    """Processes of the other ranks on this host; collective."""
    host = zlib.crc32(socket.gethostname().encode())
    everybody = channel.all_gather(torch.tensor([host, os.getpid()]))
    return [int(pid) for rank, (other, pid) in enumerate(everybody) if rank != channel.rank and int(other) == host]


def kill_stopped(processes: Sequence[int]) -> None:
    """Kill ranks that were suspended (SIGSTOP, a debugger): the launcher's SIGTERM would not reach them."""
    for pid in processes:
        with suppress(psutil.Error, OSError):
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                log.error("%s", f"process {pid} of this job is suspended: killed")
                os.kill(pid, signal.SIGKILL)
