"""Jobs of several ranks, forked from a process that has imported everything: four ranks start in a second, not fifteen.

Where the machine allows it the process has a network of its own, with nothing in it but lo, whose bytes can be counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.launch import jobs, zygote

_PR_SET_PDEATHSIG = 1
_LO_UP = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@dataclass(frozen=True)
class _Job:
    name: str
    folder: Path
    ranks: int
    port: int
    arguments: tuple[str, ...]
    crash: tuple[int, zygote.Point, int] | None


@dataclass(frozen=True)
class Ended:
    """How a job ended: of each rank its exit code (negative: the signal that killed it) and what it printed."""

    codes: list[int]
    out: list[str]
    err: list[str]


def isolation() -> list[str] | None:
    """The command that gives a process a network of its own; None if there is none."""
    for options in (["-n"], ["-r", "-n"]):
        command = ["unshare", *options, *_LO_UP]
        try:
            if subprocess.run([*command, "true"], capture_output=True, timeout=20).returncode == 0:
                return command
        except OSError:
            return None
    return None


class Ranks(zygote.Warm):
    """The process; one job at a time."""

    def __init__(self) -> None:
        command = isolation()
        self.isolated = command is not None
        super().__init__("tests.launch.ranks", jobs.environment(), command or ())
        self._job: _Job | None = None

    def start(
        self,
        name: str,
        folder: Path,
        ranks: int,
        *arguments: str | Path,
        crash: tuple[int, zygote.Point, int] | None = None,
    ) -> list[int]:
        """Start `zo_ds train`; the processes of its ranks.

        Args:
            name: of the files that ranks print to.
            folder: they run in.
            ranks: how many.
            arguments: of the command line.
            crash: (rank, moment, number): kill this rank with SIGKILL at the so-manieth time of a moment, from 1.
        """
        port = 0 if ranks == 1 else jobs.free_port()
        self._job = _Job(name, folder, ranks, port, tuple(map(str, arguments)), crash)
        self._connection.send(self._job)
        pids: list[int] = self._connection.recv()
        return pids

    def wait(self, timeout: float = 120) -> Ended:
        """Wait until all ranks of the job have ended."""
        assert self._job is not None
        if not self._connection.poll(timeout):
            raise TimeoutError(f"{self._job.name} took more than {timeout:g} s")
        codes: list[int] = self._connection.recv()
        texts = [
            [_text_file(self._job, rank, stream).read_text() for rank in range(self._job.ranks)]
            for stream in ("out", "err")
        ]
        return Ended(codes, *texts)

    def run(self, name: str, folder: Path, ranks: int, *arguments: str | Path) -> Ended:
        """Start a job and wait for its end."""
        self.start(name, folder, ranks, *arguments)
        return self.wait()

    def train(self, folder: Path, name: str, count: int, *arguments: str) -> Path:
        """The run directory, within the folder, of a job that must end well."""
        ended = self.run(name, folder, count, "recipe.yaml", f"output.run_dir={name}", *arguments)
        assert ended.codes == [0] * count, ended.err
        return folder / name

    def lo_bytes(self) -> int:
        """Bytes that have gone over lo in the network of these jobs."""
        lines = Path(f"/proc/{self._process.pid}/net/dev").read_text().splitlines()
        (counters,) = (line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
        return int(counters[8])


def _text_file(job: _Job, rank: int, stream: str) -> Path:
    return job.folder / f"{job.name}-{rank}.{stream}"


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(connection: Connection) -> tuple[_Job, int] | None:
    """Fork the ranks of each job until the driver is gone. In a child: which rank of which job it is."""
    connection.send("ready")
    while True:
        try:
            job: _Job = connection.recv()
        except (EOFError, ConnectionError):
            return None
        parent, pids = os.getpid(), list[int]()
        for rank in range(job.ranks):
            pid = os.fork()
            if pid == 0:
                connection.close()
                _die_with(parent)
                return job, rank
            pids.append(pid)
        connection.send(pids)
        running = {os.pidfd_open(pid): pid for pid in pids}
        codes = dict.fromkeys(pids, 0)
        while running:
            for ended in wait([connection, *running]):
                if ended is connection:  # the driver is gone
                    return None
                assert isinstance(ended, int)
                pid, status = os.waitpid(running.pop(ended), 0)
                codes[pid] = os.waitstatus_to_exitcode(status)
                os.close(ended)
        connection.send(list(codes.values()))


def _become(job: _Job, rank: int) -> None:
    import torch

    for number, stream in ((1, "out"), (2, "err")):
        handle = os.open(_text_file(job, rank, stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(job.folder)
    torch.set_num_threads(1)
    if job.ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
        os.environ.update({name: str(value) for name, value in numbers.items()})
    if job.crash is not None and job.crash[0] == rank:
        zygote._at(*job.crash[1:], lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = ["zo_ds", "train", *job.arguments]


def main() -> None:
    """Serve the driver behind the given file descriptor."""
    zygote._import_everything()
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    given = _serve(Connection(int(sys.argv[1])))
    if given is not None:
        from zo_ds.cli import main as zo_ds

        _become(*given)
        zo_ds()


if __name__ == "__main__":
    main()
