"""Weak scaling over a slow network, on one machine: ranks in network namespaces, joined by a wire made here.

    python tools/bench_scaling.py [--json PATH] [--quick] [--slow-rank FACTOR] [--ranks N] [--units N]

Needs root, ip, unshare, taskset, /dev/net/tun, a core for each rank. A rank is a node to the job: it has a network
and a host name of its own, one core and one thread, and computes as many micro-batches of the same shape as every
other. The wire is a thread that carries packets between TUN devices with a rate and a delay: many kernels lack netem.

Jobs of one rank, as many at the same time as there are ranks, are the measure: they share caches and memory
bandwidth as the ranks of the job do. All jobs live at the same time and take a few steps in turns, while the others are
suspended, so that a drifting machine hits all alike. A step lasts from one row of metrics.jsonl to the next.

Bytes are those that the kernel counted at each rank's device, less what an idle one counts. Payload is that without 52
bytes a packet (IP, TCP, time stamps): what ranks send, with the 8 bytes that go before every message.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml
from measure import show, write_json
from wire import Condition, Counts, Network, call

from zo_ds.errors import MachineError

ROOT = Path(__file__).resolve().parents[1]
DIRECTIONS = 8
MICRO_BATCH = 4
PORT = 29400
TIMED = "medium"
SIZES = {"small": (128, 4), "medium": (512, 6), "large": (768, 10)}
"""Width and layers: 1, 19 and 71 million parameters."""

NETWORKS = (
    Condition("no_delay"),
    Condition("1ms_each_way", delay_s=1e-3),
    Condition("10ms_each_way", delay_s=10e-3),
    Condition("100mbit", bytes_per_s=100e6 / 8),
)


class Job:
    """Ranks of a training job; suspended except while it is asked for steps.

    Args:
        network: that they are in.
        folder: of the recipe and of what the ranks print.
        name: of the run directory.
        recipe: what they train.
        ranks: places in the network, which are the cores too.
        units: micro-batches of a step for each rank.
    """

    def __init__(
        self, network: Network, folder: Path, name: str, recipe: Path, ranks: Sequence[int], units: int
    ) -> None:
        self.run_dir = folder / name
        self._outputs = [folder / f"{name}-rank{rank}.txt" for rank in range(len(ranks))]
        self.processes: list[subprocess.Popen[bytes]] = []
        cores = sorted(os.sched_getaffinity(0))
        settings = [
            f"output.run_dir={self.run_dir}",
            f"training.batch_size={MICRO_BATCH * units * len(ranks)}",
        ]
        for rank, place in enumerate(ranks):
            numbers = {"RANK": rank, "WORLD_SIZE": len(ranks), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            joined = {"MASTER_ADDR": network.addresses[ranks[0]]}
            quiet = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
            # The package beside this tool, whatever is installed.
            paths = {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(PORT)}
            given = {**os.environ, **{k: str(v) for k, v in numbers.items()}, **joined, **quiet, **paths}
            script = [sys.executable, str(ROOT / "launch" / "finetune.py"), "--config", str(recipe), *settings]
            command = network.within(place, "taskset", "-c", str(cores[place]), *script)
            with self._outputs[rank].open("wb") as output:
                self.processes.append(
                    subprocess.Popen(command, cwd=folder, env=given, stdout=output, stderr=subprocess.STDOUT)
                )

    def row_times(self) -> list[float]:
        """When each training step was reported."""
        file = self.run_dir / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        return [row["time"] for row in rows if row["kind"] == "train"]

    def signal(self, number: int) -> None:
        """Send a signal to all ranks."""
        for process in self.processes:
            process.send_signal(number)

    def check(self) -> None:
        """Look whether all ranks live.

        Raises:
            RuntimeError: one ended; what it printed last is in the message.
        """
        for process, output in zip(self.processes, self._outputs, strict=True):
            if process.poll() is not None:
                text = output.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"{output.stem} ended with {process.returncode}:\n{text}")

    def end(self) -> None:
        """Kill it, suspended or not."""
        for process in self.processes:
            process.kill()
            process.wait()


def advance(jobs: Sequence[Job], steps: int) -> list[float]:
    """Let jobs run until each has taken so many steps, and one before them that does not count.

    Returns:
        Seconds of each step that counts. The first one had begun before the job was suspended.
    """
    before = [len(job.row_times()) for job in jobs]
    for job in jobs:
        job.signal(signal.SIGCONT)
    while any(len(job.row_times()) < start + steps + 1 for job, start in zip(jobs, before, strict=True)):
        time.sleep(0.02)
        for job in jobs:
            job.check()
    for job in jobs:
        job.signal(signal.SIGSTOP)
    seconds = []
    for job, start in zip(jobs, before, strict=True):
        times = job.row_times()[start : start + steps + 1]
        seconds += [later - earlier for earlier, later in pairwise(times)]
    return seconds


@contextmanager
def throttled(process: subprocess.Popen[bytes], factor: float) -> Iterator[None]:
    """Suspend a process for so much of every 30 ms that it is `factor` times slower."""
    over = threading.Event()
    period = 0.03

    def pulse() -> None:
        begin = time.monotonic()
        for beat in range(10**9):
            process.send_signal(signal.SIGCONT)
            # By the clock, so that a late wake-up is not added to every period.
            if over.wait(max(0.0, begin + (beat + 1 / factor) * period - time.monotonic())):
                return
            process.send_signal(signal.SIGSTOP)
            if over.wait(max(0.0, begin + (beat + 1) * period - time.monotonic())):
                return

    thread = threading.Thread(target=pulse, daemon=True)
    if factor > 1:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if factor > 1:
            thread.join()
            process.send_signal(signal.SIGSTOP)  # as the rest of its job now is


class Outside:
    """How busy the machine is with other things, from here on.

    Args:
        processes: of the bench; this one is added.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._ours = [psutil.Process(), *(psutil.Process(process.pid) for process in processes)]
        self._before, self._begin = self._others(), time.monotonic()

    def _others(self) -> float:
        total = psutil.cpu_times()
        ours = [process.cpu_times() for process in self._ours]
        return float(sum(total) - total.idle - total.iowait - sum(t.user + t.system for t in ours))

    def share(self) -> float:
        """Of all cores."""
        return (self._others() - self._before) / (time.monotonic() - self._begin) / (os.cpu_count() or 1)


_MAKE_MODEL = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
folder, width, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
words = ["<pad>", "<unk>", "</s>", "It", "was", "terrible", "great", *(f"w{n}" for n in range(500))]
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64
).save_pretrained(folder)
torch.manual_seed(0)
OPTForCausalLM(OPTConfig(
    vocab_size=len(words), hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
    num_attention_heads=width // 64, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=2,
)).save_pretrained(folder)
"""


def make_recipe(folder: Path, size: str) -> Path:
    """A random OPT, texts of one length (so that all steps cost the same), and a recipe for jobs that never end."""
    model, data = folder / f"model-{size}", folder / "data"
    call(sys.executable, "-W", "ignore", "-c", _MAKE_MODEL, str(model), *map(str, SIZES[size]))
    data.mkdir(exist_ok=True)
    for split, count in (("train", 64), ("dev", 4), ("test", 4)):
        texts = [" ".join(f"w{(7 * row + 13 * word) % 500}" for word in range(12)) for row in range(count)]
        lines = [json.dumps({"text": text, "label": row % 2}) for row, text in enumerate(texts)]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tree = {
        "name": size,
        "model": {"path": str(model)},
        "data": {"path": str(data)},
        "task": {"name": "movie-sentiment"},
        "zeroth_order": {"lr": 1e-4, "num_directions": DIRECTIONS},
        "training": {"steps": 10000, "micro_batch_size": MICRO_BATCH, "batch_size": MICRO_BATCH, "eval_every": 10000},
        # A suspended job has not hung.
        "parallel": {"threads": 1, "timeout_s": 36000, "hang_s": 36000},
        "output": {"tensorboard": False, "save_model": False},
    }
    recipe = folder / f"{size}.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def time_steps(
    network: Network, folder: Path, conditions: Sequence[Condition], rounds: int, steps: int, units: int
) -> tuple[dict[str, float], dict[str, tuple[str, float]]]:
    """Median seconds of a step under each condition beside what is asked of it."""
    places = range(len(network.names))
    recipe = make_recipe(folder, TIMED)
    found: dict[str, float] = {}
    for condition in conditions:
        network.wire.condition = condition
        found[f"rtt_ms_{condition.name}"] = network.round_trip() * 1e3
    network.wire.condition = Condition("none")
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        jobs = [Job(network, folder, f"one{place}", recipe, [place], units) for place in places]
        jobs.append(Job(network, folder, "all", recipe, list(places), units))
        for job in jobs:
            stack.callback(job.end)
        for job in jobs:  # one after the other: on shared cores a start takes long
            advance([job], 1)
        ones, everyone = jobs[:-1], jobs[-1]
        outside = Outside([process for job in jobs for process in job.processes])
        for _ in range(rounds):
            times.setdefault("alone", []).extend(advance(ones[:1], steps))
            times.setdefault("one_rank", []).extend(advance(ones, steps))
            for condition in conditions:
                network.wire.condition = condition
                with throttled(everyone.processes[-1], condition.slow):
                    taken = advance([everyone], steps)
                times.setdefault(condition.name, []).extend(taken)
        found["cpu_share_of_others"] = outside.share()
    more, targets = compare(times, conditions, found)
    return {**found, **more}, targets


def compare(
    times: dict[str, list[float]], conditions: Sequence[Condition], found: dict[str, float]
) -> tuple[dict[str, float], dict[str, tuple[str, float]]]:
    """Steps of the job beside those of one rank.

    Medians are what was asked for. A job waits for the slowest of its ranks, so that whatever else the machine does
    hits it more often than a job of one rank; the fastest quarter of the steps shows what is left without that.
    """
    figures: dict[str, float] = {}
    targets: dict[str, tuple[str, float]] = {}
    for kind, of in (("step_s", statistics.median), ("quartile_s", lambda v: statistics.quantiles(v, n=4)[0])):
        one = of(times["one_rank"])
        figures |= {f"{kind}_one_rank_nothing_beside": of(times["alone"]), f"{kind}_one_rank_each": one}
        for condition in conditions:
            key = f"{kind}_{condition.name}"
            figures[key] = of(times[condition.name])
            figures[f"{key}_over_one_rank"] = figures[key] / one
            if condition.slow == 1:
                targets[key] = ("<=", round(1.03 * one + 2 * found[f"rtt_ms_{condition.name}"] / 1e3, 4))
    return figures, targets


def count_bytes(network: Network, folder: Path, sizes: Sequence[str], steps: int, idle_s: float) -> dict[str, float]:
    """Bytes a step of every rank, for models of several sizes."""
    network.wire.condition = NETWORKS[0]
    before = network.counted()
    time.sleep(idle_s)
    after = network.counted()
    idle = [
        Counts(0.0, *((getattr(b, key) - getattr(a, key)) / (b.at - a.at) for key in list(vars(a))[1:]))
        for a, b in zip(before, after, strict=True)
    ]
    found = {"idle_bytes_per_s": float(sum(i.sent + i.received for i in idle))}
    for size in sizes:
        with ExitStack() as stack:
            job = Job(network, folder, f"bytes-{size}", make_recipe(folder, size), range(len(network.names)), 1)
            stack.callback(job.end)
            advance([job], 1)
            before = network.counted()
            advance([job], steps - 1)  # and the one that does not count as time
            after = network.counted()
        for rank, (a, b, quiet) in enumerate(zip(before, after, idle, strict=True)):
            found |= {f"{key}_{size}_rank{rank}": value for key, value in b.since(a, quiet, steps).items()}
    return found


def check_machine(ranks: int) -> None:
    """See whether this can work here.

    Raises:
        MachineError: it cannot.
    """
    missing = [tool for tool in ("ip", "unshare", "taskset", "hostname") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        raise MachineError("this needs root", why="it makes network namespaces", remedy="start it as root")
    if missing:
        raise MachineError(f"not here: {', '.join(missing)}", remedy="install iproute2, util-linux and hostname")
    if not Path("/dev/net/tun").exists():
        raise MachineError("there is no /dev/net/tun", remedy="modprobe tun, or give the device to the container")
    if len(os.sched_getaffinity(0)) < ranks:
        raise MachineError(f"{ranks} ranks need {ranks} cores", remedy="fewer --ranks, or a larger machine")


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, float], dict[str, tuple[str, float]]]:
    """All figures, and what is asked of them."""
    rounds, steps = (1, 3) if options.quick else (options.rounds, 5)
    conditions = list(NETWORKS)
    if options.slow_rank > 1:
        conditions.append(Condition(f"no_delay_slow_rank_{options.slow_rank:g}x", slow=options.slow_rank))
    sizes = ["small", "large"]
    with Network(options.ranks) as network:
        found, targets = time_steps(network, folder, conditions, rounds, steps, options.units)
        # A multiple of journal.hash_every, which has an exchange of its own.
        found |= count_bytes(network, folder, sizes, 10 if options.quick else 20, 2.0)
    formula = float(16 * (DIRECTIONS + 1))
    found["16_times_n_plus_1"] = formula
    for size in sizes:
        found[f"constant_{size}"] = found[f"payload_sent_{size}_rank1"] - formula
    found["payload_large_over_small"] = found["payload_sent_large_rank1"] / found["payload_sent_small_rank1"]
    targets["payload_large_over_small"] = ("<=", 1.05)
    return found, targets


def stop(number: int, _: object) -> None:
    """End with the namespaces and the ranks removed, however often it is asked."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few steps: whether it works")
    parser.add_argument("--slow-rank", type=float, default=1.0, metavar="FACTOR", help="also with a slower last rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--units", type=int, default=1, help="micro-batches of each rank in a step")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    environment: dict[str, Any] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "ranks": options.ranks,
        "units": options.units,
        "command": sys.argv,
    }
    try:
        check_machine(options.ranks)
        with tempfile.TemporaryDirectory() as folder:
            found, targets = measure(options, Path(folder))
    except MachineError as error:
        print(f"bench_scaling: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(environment, indent=2) + "\n")
    show(found, targets)
    write_json(options.json, {**found, "asked": targets, "environment": environment})


if __name__ == "__main__":
    main()
