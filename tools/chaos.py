"""Ten minutes of faults against a supervised job on 4 ranks, through the deepspeed launcher.

    python tools/chaos.py [--json PATH] [--minutes 10] [--every 20] [--ranks 4] [--seed 0] [--keep FOLDER]

Every `--every` seconds of training one fault: kill -9 of a rank, of rank 0, SIGSTOP of a rank, a disk that is full for
5 s, a truncated journal, a flipped bit in the newest snapshot (both with a kill, since nobody reads them before).
Afterwards the run is ended at the step it has reached, and the same recipe is run once without faults on one rank.

    faults, recovered   a fault is recovered when the job was started again and takes steps (a full disk: takes steps)
    hash_equal          weights_sha256 and every record are those of the run without faults
    goodput             seconds of training that is part of the final run / (wall time - process start). Training is
                        the time from one step to the next of the same process; process start is from the moment
                        that the last rank of the life before is gone until the run directory is opened (the launcher's
                        end, the supervisor's pause, interpreter, imports, rendezvous, model, DeepSpeed); everything
                        else counts as lost: noticing, checking, replaying, lost steps
    goodput_launcher_end_counted_as_lost
                        the same, but the launcher's end (it looks after its ranks once a second) and the pause count
                        as lost, too

The disk that fills up is a tmpfs, which needs root; without it that fault is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.launch import jobs  # noqa: E402
from zo_ds.trainer.environment import describe  # noqa: E402

MANY_STEPS = 300_000
PATIENCE_S = 120.0
FULL_S = 5.0


@dataclass
class Job:
    """The supervised job and what is known about it.

    Attributes:
        folder: of recipe and run.
        run: run directory.
        command: that starts it.
        process: the supervisor.
        launches: when the command was started.
        deaths: when the last rank of a life was gone.
    """

    folder: Path
    run: Path
    command: list[str]
    process: subprocess.Popen[str] | None = None
    launches: list[float] = field(default_factory=list)
    deaths: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start the supervisor."""
        with (self.folder / "output.txt").open("w", encoding="utf-8") as out:
            self.launches.append(time.time())
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / "supervise.sh"), *self.command],
                cwd=self.folder,
                env=jobs.environment(OMP_NUM_THREADS="1"),
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stderr is not None
        with (self.folder / "errors.txt").open("w", encoding="utf-8") as copy:
            for line in self.process.stderr:
                copy.write(line)
                copy.flush()
                found = re.search(r"starting again in (\d+) s", line)
                if found:
                    self.launches.append(time.time() + int(found.group(1)))

    def ranks(self) -> dict[int, psutil.Process]:
        """Living ranks by number."""
        assert self.process is not None
        found = {}
        for process in psutil.process_iter():
            try:
                command, started = process.cmdline(), process.environ()
            except (psutil.Error, OSError):
                continue
            if str(self.folder / "recipe.yaml") in command and "--local_rank=" in " ".join(command):
                found[int(started["RANK"])] = process
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says, whole lines only."""
        file = self.run / "metrics.jsonl"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def latest(self) -> tuple[int, float]:
        """(step, time) of the last step that was reported."""
        file = self.run / "metrics.jsonl"
        if not file.exists():
            return 0, 0.0
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - 4096))
            lines = handle.read().split(b"\n")[1:-1]
        rows = [json.loads(line) for line in lines if line.startswith(b'{"kind": "train"')]
        return max(((row["step"], row["time"]) for row in rows), default=(0, 0.0))

    def wait_for_step(self, since: float) -> bool:
        """Whether a step is reported that was taken after some time, within our patience."""
        return self._wait(lambda: self.latest()[1] > since)

    def wait_for_launch(self, number: int, ranks: list[psutil.Process]) -> bool:
        """Whether these ranks go and the command is started so many times, within our patience."""
        gone = self._wait(lambda: all(_is_gone(rank) for rank in ranks))
        self.deaths.append(time.time())
        return gone and self._wait(lambda: len(self.launches) >= number)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                return False
            if condition():
                return True
            time.sleep(0.02)
        return False

    def newest_segment(self) -> Path:
        """File of the journal that is written to."""
        return max((self.run / "journal").glob("*.zoj"))


def _is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def kill(job: Job, rng: random.Random, rank: int | None = None) -> str:
    """Kill -9 a rank, any but rank 0 if none is named."""
    living = job.ranks()
    number = rng.choice([r for r in living if r] or [0]) if rank is None else rank
    living[number].send_signal(signal.SIGKILL)
    return f"kill -9 rank {number}"


def kill_first(job: Job, rng: random.Random) -> str:
    """Kill -9 rank 0, the writer."""
    return kill(job, rng, 0)


def suspend(job: Job, rng: random.Random) -> str:
    """SIGSTOP a rank."""
    living = job.ranks()
    number = rng.choice(sorted(living))
    living[number].send_signal(signal.SIGSTOP)
    return f"SIGSTOP rank {number}"


def fill_disk(job: Job, rng: random.Random) -> str:
    """Leave no byte on the run's file system for a while."""
    filler = job.run / "filler"
    handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
    size = 0
    try:
        while True:
            size += os.pwrite(handle, b"x" * 4096, size)
    except OSError:
        pass
    finally:
        os.close(handle)
    time.sleep(FULL_S)
    filler.unlink()
    return f"disk full for {FULL_S:g} s"


def truncate_journal(job: Job, rng: random.Random) -> str:
    """Cut the end of the journal off while the job is down."""
    kill(job, rng, 0)
    while job.ranks().keys() & {0}:
        time.sleep(0.01)
    file = job.newest_segment()
    raw = file.read_bytes().rstrip(b"\0")
    length = max(1, len(raw) - rng.randrange(1, 4000))
    os.truncate(file, length)
    return f"journal truncated to {length} of {len(raw)} bytes"


def flip_snapshot(job: Job, rng: random.Random) -> str:
    """Flip a bit in the newest snapshot while the job is down."""
    kill(job, rng, 0)
    folders = sorted((job.run / "snapshots").glob("step-????????"))
    if not folders:
        return "kill -9 rank 0 (no snapshot yet)"
    file = folders[-1] / "model.safetensors"
    at = rng.randrange(file.stat().st_size)
    with file.open("r+b") as handle:
        handle.seek(at)
        (byte,) = handle.read(1)
        handle.seek(at)
        handle.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return f"bit flipped in {folders[-1].name}, byte {at}"


FAULTS: dict[str, Callable[[Job, random.Random], str]] = {
    "kill_rank": kill,
    "kill_rank_0": kill_first,
    "stop_rank": suspend,
    "disk_full": fill_disk,
    "truncate_journal": truncate_journal,
    "flip_snapshot_bit": flip_snapshot,
}


def torment(job: Job, minutes: float, every: float, kinds: list[str], seed: int) -> list[dict[str, Any]]:
    """Strike until the time is over; what happened."""
    rng = random.Random(seed)
    faults: list[dict[str, Any]] = []
    queue: list[str] = []
    end = time.time() + minutes * 60
    while time.time() < end:
        time.sleep(every)
        queue = queue or rng.sample(kinds, len(kinds))
        kind, step, lives, struck = queue.pop(), job.latest()[0], len(job.launches), time.time()
        ranks = list(job.ranks().values())
        detail = FAULTS[kind](job, rng)
        again = kind == "disk_full" or job.wait_for_launch(lives + 1, ranks)
        recovered = again and job.wait_for_step(time.time() if kind == "disk_full" else job.launches[-1])
        faults.append({"kind": kind, "detail": detail, "recovered": recovered, "step": step})
        left = max(0.0, end - time.time())
        print(
            f"fault {len(faults):>2} at step {step:>6}: {detail:<48} "
            f"{'recovered' if recovered else 'NOT RECOVERED'} in {time.time() - struck:5.1f} s | ETA {left:4.0f} s",
            flush=True,
        )
        if not recovered:
            break
    return faults


def goodput(job: Job, first: float, last: float) -> dict[str, float]:
    """Share of the time, process start left out, that went into steps of the final run."""
    rows = job.rows()
    starts = [row for row in rows if row["kind"] == "start"]
    useful, before = 0.0, 0.0
    for row in (row for row in rows if row["time"] <= last):
        if row["kind"] == "train":
            useful += row["time"] - before if before else row.get("seconds", 0.0)
        before = row["time"] if row["kind"] == "train" else 0.0
    start_s = ended_s = 0.0
    for launch in job.launches:
        opened = [row["time"] - row["open_s"] for row in starts if row["time"] > launch]
        later = [other for other in job.launches if other > launch]
        # A life that was struck before it opened the run is process start as a whole.
        start_s += min([*opened, *later, last]) - launch
        ended_s += launch - max((death for death in job.deaths if death <= launch), default=launch)
    wall = last - first
    return {
        "useful_s": useful,
        "wall_s": wall,
        "process_start_s": start_s,
        "launcher_end_s": ended_s,
        "goodput": useful / (wall - start_s - ended_s),
        "goodput_launcher_end_counted_as_lost": useful / (wall - start_s),
    }


def reference(folder: Path, run: Path, steps: int) -> dict[str, Any]:
    """End the tormented run at its step, run the same without faults on one rank, and compare."""
    outcome = {}
    for name, ranks in ((str(run), 2), ("undisturbed", 1)):
        done = jobs.deepspeed(
            folder,
            ranks,
            str(folder / "recipe.yaml"),
            f"output.run_dir={name}",
            f"training.steps={steps}",
            timeout=3600,
        )
        if done.code:
            sys.exit(f"chaos: {name} ended with {done.code}\n{done.err[-2000:]}")
        outcome[name] = folder / name
    one, other = outcome.values()
    return {
        "hash_equal": jobs.result(one)["weights_sha256"] == jobs.result(other)["weights_sha256"]
        and jobs.records(one) == jobs.records(other),
        "weights_sha256": jobs.result(one)["weights_sha256"],
    }


def mounted(folder: Path, mib: int) -> bool:
    """Whether a file system of its own could be put there."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "zo_ds-chaos", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


def main() -> None:
    """Set up, torment, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=20.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work here and leave everything")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="zo_ds-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    disk = folder / "disk"
    own_disk = mounted(disk, 256)
    try:
        tree = measure(folder.resolve(), disk.resolve() / "run", own_disk, options)
    finally:
        if own_disk:
            subprocess.run(["umount", "-l", str(disk)], check=False)
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({key: value for key, value in tree.items() if key not in ("events", "environment")}, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if tree["recovered"] == tree["faults"] and tree["hash_equal"] else 1)


def measure(folder: Path, run: Path, own_disk: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The whole experiment; what the JSON holds."""
    kinds = [kind for kind in FAULTS if own_disk or kind != "disk_full"]
    recipe = jobs.make_recipe(
        folder,
        zeroth_order={"lr": 2e-5, "num_directions": 4, "strict": True},
        training={"steps": MANY_STEPS, "batch_size": 8, "micro_batch_size": 2, "eval_every": None},
        parallel={"threads": 1, "timeout_s": 120, "hang_s": 1},
        journal={"snapshot_replay_s": 0.1, "hash_every": 10},
    )
    launcher = [str(jobs.BIN / "deepspeed"), "-q", "--num_accelerators", str(options.ranks)]
    launcher += ["--master_port", str(jobs.free_port()), str(ROOT / "launch" / "finetune.py"), "--config"]
    job = Job(folder, run, [*launcher, str(recipe), f"output.run_dir={run}"])
    job.start()
    assert job.process is not None
    try:
        if not job.wait_for_step(0.0):
            sys.exit(f"chaos: the job did not start: {(folder / 'errors.txt').read_text()[-2000:]}")
        first = job.launches[0]
        print(f"first step after {time.time() - first:.1f} s; faults: {', '.join(kinds)}", flush=True)
        faults = torment(job, options.minutes, options.every, kinds, options.seed)
        last = time.time()
    finally:
        job.process.send_signal(signal.SIGTERM)
        code = job.process.wait(timeout=60)
    time.sleep(1.0)
    left = sorted(job.ranks())
    found = goodput(job, first, last)
    steps = jobs.steps_of(run)
    print(f"{steps} steps; now the same without faults", flush=True)
    return {
        "faults": len(faults),
        "recovered": sum(fault["recovered"] for fault in faults),
        **reference(folder, run, steps),
        **found,
        "steps": steps,
        "supervisor_code": code,
        "orphans": len(left),
        "kinds": kinds,
        "events": faults,
        "environment": describe(options.ranks, 1),
    }


if __name__ == "__main__":
    main()
