"""A process that has imported everything and forks a child for each start of a run: half a second, not six.

The child is `zo_ds train ...` itself, with real files, signals and exit; it can be told to die, or to wait, at a named
moment. It dies with this process, and this process dies with the one that drives it.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import getattr_static
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

READY_S = 120.0
"""How long the imports may take on a busy machine."""
_PR_SET_PDEATHSIG = 1
_MODULES = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "setuptools",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.llama.modeling_llama",
    "zo_ds.cli",
    "zo_ds.trainer.train",
)
"""What a run imports in the end, sooner or later."""


@dataclass(frozen=True)
class Point:
    """A moment: before or after a function runs.

    Attributes:
        function: its dotted name, where the program looks it up.
        after: not before it, but when it has returned.
        inside: count only calls on a thread that is inside this other function.
        about: count only calls whose arguments, as text, have this in them.
    """

    function: str
    after: bool = False
    inside: str = ""
    about: str = ""

    def __str__(self) -> str:
        short, within = (".".join(name.split(".")[-2:]) for name in (self.function, self.inside))
        about, within = f"({self.about})" if self.about else "", f" in {within}" if within else ""
        return f"{'after' if self.after else 'before'} {short}{about}{within}"


@dataclass(frozen=True)
class Start:
    """How to start a run.

    Attributes:
        arguments: of the command line.
        folder: to run in; standard output and error are appended to out.txt and err.txt in it.
        crash: kill the process with SIGKILL at the so-manieth time of a moment, from 1.
        pause: the same, but hang there; the file `paused` tells that it has come to it.
        count: write how often each of these moments came to counts.json, if the run ends by itself.
        constants: modules' constants to set, by dotted name.
    """

    arguments: Sequence[str]
    folder: Path
    crash: tuple[Point, int] | None = None
    pause: tuple[Point, int] | None = None
    count: Sequence[Point] = ()
    constants: Mapping[str, float] = field(default_factory=dict)


class Life:
    """A run that was started; made by `Zygote.start`."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid = pid
        self._connection = connection
        self._code: int | None = None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if the run has ended."""
        if self._code is None:
            os.kill(self.pid, number)  # never another process: the zygote reaps it only when it reports the end

    def wait(self, timeout: float) -> int | None:
        """Exit code (negative: the signal that killed it), None if it still runs after so many seconds."""
        if self._code is None and self._connection.poll(max(0.0, timeout)):
            self._code = self._connection.recv()
            self._connection.send(None)
        return self._code


Made = TypeVar("Made", bound="Warm")


class Warm:
    """A process that has imported everything and forks runs, to be used as a context.

    Args:
        module: of tests, run with the file number of its end of a pipe; it says when it is ready.
        environment: of it and the runs.
        prefix: command that starts it.
    """

    def __init__(self, module: str, environment: Mapping[str, str], prefix: Sequence[str] = ()) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, str(theirs.fileno())],
            cwd=Path(__file__).resolve().parents[2],
            env={**environment, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C at the terminal is for the tests
        )
        theirs.close()

    def __enter__(self: Made) -> Made:
        try:
            if not self._connection.poll(READY_S):
                raise TimeoutError(f"the imports took more than {READY_S:g} s")
            self._connection.recv()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and with it what it runs."""
        self._connection.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Zygote(Warm):
    """Forks one run at a time.

    Args:
        environment: of it and the runs.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__("tests.launch.zygote", environment)
        self._life: Life | None = None

    def start(self, start: Start) -> Life:
        """Start a run; the one before must have ended, or is killed."""
        if self._life is not None and self._life.wait(0) is None:
            self._life.kill()
            self._life.wait(60)
        self._connection.send(start)
        self._life = Life(self._connection.recv(), self._connection)
        return self._life

    def run(self, start: Start, timeout: float = 120.0) -> int:
        """Start a run and return its exit code.

        Raises:
            TimeoutError: it took too long, and was killed.
        """
        life = self.start(start)
        code = life.wait(timeout)
        if code is None:
            life.kill()
            life.wait(60)
            raise TimeoutError(f"a run took more than {timeout:g} s: {start.folder}")
        return code


def _serve(connection: Connection) -> Start | None:
    """In the zygote: fork for every request until the driver is gone. In a child: what to run."""
    connection.send("ready")
    while True:
        try:
            start: Start = connection.recv()
        except (EOFError, ConnectionError):
            return None
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            connection.close()
            _die_with(parent)
            return start
        connection.send(pid)
        ended = os.pidfd_open(pid)
        if connection in wait([connection, ended]):  # the driver is gone
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        os.close(ended)
        # Told first and reaped when the driver knows: until then it may still send signals to this pid.
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert found is not None
        connection.send(found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)
        with suppress(EOFError, ConnectionError):
            connection.recv()
        os.waitpid(pid, 0)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A shell's background jobs inherit that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getppid() != parent:
        os._exit(1)


def _become(start: Start) -> None:
    """Turn this child into the run: its files, its folder, its moments."""
    import torch

    for number, name in ((1, "out.txt"), (2, "err.txt")):
        handle = os.open(start.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(start.folder)
    torch.set_num_threads(1)
    for name, value in start.constants.items():
        owner, attribute = _find(name)
        getattr(owner, attribute)  # it must be there
        setattr(owner, attribute, value)
    if start.crash is not None:
        _at(start.crash[0], start.crash[1], lambda: os.kill(os.getpid(), signal.SIGKILL))
    if start.pause is not None:
        _at(start.pause[0], start.pause[1], _hang)
    if start.count:
        counters = [_at(point) for point in start.count]
        atexit.register(lambda: Path("counts.json").write_text(json.dumps([counter() for counter in counters])))


def _hang() -> None:
    Path("paused").touch()
    while True:
        time.sleep(1)


def _at(point: Point, number: int | None = None, act: Callable[[], None] = lambda: None) -> Callable[[], int]:
    """Do something at the so-manieth time of a moment; returns what tells how often it has come."""
    within = threading.local()
    lock = threading.Lock()
    count = 0

    def come(arguments: object) -> None:
        nonlocal count
        if point.inside and not getattr(within, "depth", 0):
            return
        if point.about and point.about not in str(arguments):
            return
        with lock:
            count += 1
            now = count == number
        if now:
            act()

    def moment(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if not point.after:
            come((given, named))
        found = function(*given, **named)
        if point.after:
            come((given, named))
        return found

    def inside(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        within.depth = getattr(within, "depth", 0) + 1
        try:
            return function(*given, **named)
        finally:
            within.depth -= 1

    _wrap(point.function, moment)
    if point.inside:
        _wrap(point.inside, inside)
    return lambda: count


def _wrap(name: str, around: Callable[..., Any]) -> None:
    owner, attribute = _find(name)
    found = getattr_static(owner, attribute)
    kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    function = found.__func__ if kind else found

    def wrapped(*given: Any, **named: Any) -> Any:
        return around(function, *given, **named)

    setattr(owner, attribute, kind(wrapped) if kind else wrapped)


def _find(name: str) -> tuple[Any, str]:
    """(module or class, attribute) of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        with suppress(ModuleNotFoundError):
            owner: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:-1]:
                owner = getattr(owner, part)
            return owner, parts[-1]
    raise AttributeError(f"there is no {name}")


def _import_everything() -> None:
    for name in _MODULES:
        importlib.import_module(name)


def main() -> None:
    """Serve the driver behind the given file descriptor."""
    _import_everything()
    # Garbage that was here before a fork is not the child's to collect: it would copy every page to look at it.
    gc.collect()
    gc.freeze()
    # A fork copies one thread only.
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    start = _serve(Connection(int(sys.argv[1])))
    if start is not None:
        from zo_ds.cli import main as zo_ds

        _become(start)
        sys.argv = ["zo_ds", *start.arguments]
        zo_ds()


if __name__ == "__main__":
    main()
