"""What dies, hangs or is told to stop ends the whole job, soon and with a code that says whether to start it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launch import jobs

pytestmark = pytest.mark.launch
SUPERVISE = jobs.ROOT / "launch" / "supervise.sh"
STEPS = 200
GONE_S = 30.0
ENDLESS = ("training.steps=100000",)
HURT = """
import os, signal, sys, time
from pathlib import Path
import zo_ds.engine.base as base
import zo_ds.engine.engine as engine
import zo_ds.trainer.session as session

def raise_in_one(original):
    def step(self, batch, spare=None):
        if self.steps_done == 3 and os.environ["LOCAL_RANK"] == "1":
            raise RuntimeError("only here")
        return original(self, batch, spare)
    return step

def save_slowly(original):
    def save(*given, **named):
        time.sleep(6)
        return original(*given, **named)
    return save

what = sys.argv.pop(1)
if what == "raise":
    engine.ZOEngine.step = raise_in_one(engine.ZOEngine.step)
elif what == "save":
    base.save_pretrained = save_slowly(base.save_pretrained)
from zo_ds.cli import finetune
finetune()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a recipe and the run `whole` that nothing happened to."""
    folder = tmp_path_factory.mktemp("health")
    jobs.make_recipe(
        folder,
        zeroth_order={"lr": 1e-4},
        training={"steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "eval_every": None},
        parallel={"threads": 1, "timeout_s": 120, "hang_s": 20},
    )
    done = jobs.zo_ds(folder, "train", "recipe.yaml", "output.run_dir=whole")
    assert done.code == 0, done.err
    (folder / "hurt.py").write_text(HURT)
    return folder


def wait_for(what: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes(run: Path) -> list[psutil.Process]:
    """All that belong to a job, found by the directory on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run) in part for part in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def one(run: Path, mark: str, without: str = "\0") -> psutil.Process:
    """The process of a job with an argument."""
    (found,) = [p for p in processes(run) if mark in (line := " ".join(p.cmdline())) and without not in line]
    return found


def rank_of(run: Path, rank: int) -> psutil.Process:
    return one(run, f"--local_rank={rank}", "launcher.launch")


def launch_command(run: Path, ranks: int, *arguments: str) -> list[str]:
    launcher = [str(jobs.BIN / "deepspeed"), "-q", "--num_accelerators", str(ranks)]
    script = str(jobs.ROOT / "launch" / "finetune.py")
    port = ["--master_port", str(jobs.free_port())]
    return [*launcher, *port, script, "--config", "recipe.yaml", f"output.run_dir={run}", *arguments]


@contextmanager
def started(command: list[str], folder: Path, run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job whose output goes to RUN.txt; nothing of it is left afterwards."""
    with run.with_suffix(".txt").open("wb") as output:
        job = subprocess.Popen(
            command, cwd=folder, env=jobs.environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield job
        finally:
            for process in processes(run):
                process.kill()
            job.kill()
            job.wait()


def said(run: Path) -> str:
    return run.with_suffix(".txt").read_text()


def same_as_whole(folder: Path, run: Path) -> None:
    assert jobs.records(run) == jobs.records(folder / "whole")
    assert jobs.result(run)["weights_sha256"] == jobs.result(folder / "whole")["weights_sha256"]
    assert jobs.result(run)["final_loss"] == jobs.result(folder / "whole")["final_loss"]


def by_hand(folder: Path, run: Path, *arguments: str, hurt: str | None = None) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher, whose own exit codes can be seen."""
    port, given = jobs.free_port(), ("recipe.yaml", f"output.run_dir={run}", *arguments)
    if hurt is None:
        return [jobs.start_rank(folder, rank, 2, port, *given) for rank in range(2)]
    ranks = []
    for rank in range(2):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = jobs.environment(MASTER_ADDR="127.0.0.1", **{key: str(value) for key, value in numbers.items()})
        command = [sys.executable, "hurt.py", hurt, *given]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    return ranks


def ends(ranks: list[subprocess.Popen[str]], seconds: float = GONE_S) -> tuple[list[int], list[str]]:
    """Exit codes and what was said on stderr."""
    try:
        errors = [rank.communicate(timeout=seconds)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [rank.returncode for rank in ranks], errors


# Under the launcher


def test_no_rank_outlives_the_launcher(folder: Path) -> None:
    run = folder / "orphans"
    with started(launch_command(run, 2, *ENDLESS), folder, run) as job:
        wait_for(lambda: jobs.steps_of(run) >= 5)
        launch = one(run, "launcher.launch", "--num_accelerators")
        assert len(processes(run)) == 4
        os.kill(job.pid, signal.SIGKILL)
        launch.kill()
        wait_for(lambda: not processes(run), GONE_S)
    assert job.returncode == -signal.SIGKILL
    # The rank that sees it first stops the other.
    assert any("the launcher is gone" in log.read_text() for log in run.glob("log*.txt"))


def test_a_supervised_job_that_is_hurt_ends_with_the_same_weights(folder: Path) -> None:
    run = folder / "hurt"
    command = ["bash", str(SUPERVISE), *launch_command(run, 2, "parallel.hang_s=3")]
    with started(command, folder, run) as job:
        for number, (step, rank, kind) in enumerate(
            ((10, 1, signal.SIGKILL), (40, 1, signal.SIGSTOP), (70, 0, signal.SIGKILL))
        ):
            wait_for(lambda step=step: jobs.steps_of(run) >= step)
            before = [rank_of(run, rank) for rank in range(2)]
            before[rank].send_signal(kind)
            assert not psutil.wait_procs(before, timeout=GONE_S)[1]
            wait_for(lambda number=number: said(run).count("starting again") == number + 1, GONE_S)
        assert job.wait(120) == 0
        wait_for(lambda: not processes(run), GONE_S)
    same_as_whole(folder, run)
    assert "is suspended: killed" in (run / "log.txt").read_text()


def test_a_supervised_job_that_is_stopped_leaves_nothing_behind(folder: Path) -> None:
    run = folder / "stopped"
    with started(["bash", str(SUPERVISE), *launch_command(run, 1)], folder, run) as job:
        wait_for(lambda: jobs.steps_of(run) >= 5)
        job.terminate()
        assert job.wait(GONE_S) == 75
        wait_for(lambda: not processes(run), GONE_S)
    assert 5 <= jobs.steps_of(run) < STEPS
    assert not (run / "result.json").exists()
    done = jobs.zo_ds(folder, "train", "recipe.yaml", f"output.run_dir={run}")
    assert done.code == 0, done.err
    same_as_whole(folder, run)


# Rank by rank


def test_a_suspended_rank_is_noticed_and_killed(folder: Path) -> None:
    run = folder / "suspended"
    ranks = by_hand(folder, run, "parallel.hang_s=3", *ENDLESS)
    wait_for(lambda: jobs.steps_of(run) >= 5)
    ranks[1].send_signal(signal.SIGSTOP)
    codes, errors = ends(ranks)
    assert codes == [8, -signal.SIGKILL]
    assert "no progress for" in errors[0]
    log = (run / "log.txt").read_text()
    assert f"process {ranks[1].pid} of this job is suspended: killed" in log
    assert "most recent call first" in log
    assert "all_gather" in log


def test_a_rank_that_raises_ends_the_others(folder: Path) -> None:
    run = folder / "raised"
    codes, errors = ends(by_hand(folder, run, *ENDLESS, hurt="raise"), 120)
    assert codes == [7, 1]
    assert "RuntimeError: only here" in errors[1]
    assert "another rank is gone" in errors[0]
    assert jobs.steps_of(run) == 3


def test_ranks_stop_together_when_one_is_told_to(folder: Path) -> None:
    run = folder / "told"
    ranks = by_hand(folder, run)
    wait_for(lambda: jobs.steps_of(run) >= 5)
    ranks[1].terminate()
    codes, errors = ends(ranks)
    done = jobs.steps_of(run)
    assert codes == [75, 75]
    assert all(f"stopped after step {done}, as asked" in error for error in errors)
    assert done < STEPS
    again, errors = ends(by_hand(folder, run), 120)
    assert again == [0, 0], errors
    same_as_whole(folder, run)


def test_a_long_save_is_no_hang(folder: Path) -> None:
    run = folder / "save"
    command = [sys.executable, "hurt.py", "save", "recipe.yaml", f"output.run_dir={run}", "parallel.hang_s=2"]
    done = jobs.run([*command, "training.steps=5"], folder)
    assert done.code == 0, done.err


def test_a_run_goes_on_when_the_shell_that_started_it_ends(folder: Path) -> None:
    run = folder / "background"
    command = f"{jobs.BIN / 'zo_ds'} train recipe.yaml output.run_dir={run} >/dev/null & read"
    shell = subprocess.Popen(["bash", "-c", command], cwd=folder, env=jobs.environment(), stdin=subprocess.PIPE)
    wait_for(lambda: jobs.steps_of(run) >= 5)
    (process,) = [p for p in processes(run) if "bash" not in p.name()]
    shell.communicate(b"\n")
    process.wait(120)
    assert (run / "result.json").exists()
    same_as_whole(folder, run)


# The script that starts jobs again


def supervise(folder: Path, job: str, *options: str) -> tuple[jobs.Outcome, int]:
    """Run a job, bash text, under the script; how it ended, and how often the job was started."""
    starts = folder / "starts"
    starts.write_text("")
    done = jobs.run(["bash", SUPERVISE, *options, "--", "bash", "-c", f"echo >>starts; {job}"], folder)
    return done, len(starts.read_text())


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6])
def test_what_cannot_be_helped_is_not_started_again(code: int, tmp_path: Path) -> None:
    done, starts = supervise(tmp_path, f"exit {code}")
    assert (done.code, starts) == (code, 1)
    assert "starting again cannot help" in done.err


@pytest.mark.parametrize("end", ["exit 7", "exit 8", "exit 75", "kill -KILL $$", "kill -SEGV $$", "exit 247"])
def test_what_may_be_helped_is_started_again(end: str, tmp_path: Path) -> None:
    done, starts = supervise(tmp_path, f"[ $(wc -l <starts) = 2 ] || {end}")
    assert (done.code, starts) == (0, 2)


def test_it_gives_up_in_the_end(tmp_path: Path) -> None:
    done, starts = supervise(tmp_path, "exit 7", "--restarts", "1")
    assert (done.code, starts) == (7, 2)
    assert "giving up" in done.err


def test_what_a_dead_launcher_leaves_is_removed_before_the_next_start(tmp_path: Path) -> None:
    first = "[ $(wc -l <starts) != 1 ] || { sleep 1000 & echo $! >child; exit 7; }"
    gone = "! grep -q '^State:.[RS]' /proc/$(cat child)/status"
    done, starts = supervise(tmp_path, f"{first}; for i in {{1..100}}; do {gone} && exit 0; sleep 0.1; done; exit 3")
    assert (done.code, starts) == (0, 2)


def test_an_end_that_leaves_ranks_behind_is_no_success(tmp_path: Path) -> None:
    done, starts = supervise(tmp_path, "[ $(wc -l <starts) = 2 ] || { sleep 1000 & exit 0; }")
    assert (done.code, starts) == (0, 2)


@pytest.mark.parametrize("job", ["sleep 1000 & wait", "trap '' TERM; sleep 1000 & kill -KILL $$"])
def test_stopping_it_stops_the_job(job: str, tmp_path: Path) -> None:
    script = f"echo {tmp_path} >started; {job}"
    command = ["bash", str(SUPERVISE), "bash", "-c", script, str(tmp_path / "mark")]
    with started(command, tmp_path, tmp_path / "mark") as supervisor:
        wait_for((tmp_path / "started").exists)
        supervisor.terminate()
        assert supervisor.wait(GONE_S) == 75
        wait_for(lambda: not processes(tmp_path / "mark"), GONE_S)


def test_it_says_how_it_is_used() -> None:
    done = jobs.run(["bash", SUPERVISE], jobs.ROOT)
    assert done.code == 2
    assert "usage: supervise.sh" in done.err
