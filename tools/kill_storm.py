"""Kills real training with SIGKILL at random moments, starts it again, and holds every run against an undisturbed one.

    python tools/kill_storm.py [--kills N] [--seed N] [--json PATH]

Two recipes at a time, weights resident and under ZeRO-3 with offload. After every kill: every step that was durable or
reported is still in the journal. After every run: the same weights, records, scores and metrics. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from measure import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.launch import jobs
from tests.launch.storm import STORES, Storm, make_jobs, storm
from tests.launch.zygote import Zygote
from zo_ds.trainer.environment import describe
from zo_ds.trainer.report import clock


def main() -> int:
    """Storm, show, write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_storm-"))
    with ExitStack() as held:
        zygotes = [held.enter_context(Zygote(jobs.environment())) for _ in STORES]
        made = make_jobs(zygotes, folder, steps=60, eval_every=10, lr=0.02)
        begun = time.monotonic()

        def show(found: Storm) -> None:
            left = (time.monotonic() - begun) / found.kills * (options.kills - found.kills)
            text = f"{found.kills}/{options.kills} kills, {found.runs} runs done, {found.lost} durable steps lost"
            print(f"\r{text}, {len(found.problems)} problems, ETA {clock(left)} ", end="", flush=True)

        found = storm(zygotes, made, folder, options.kills, options.seed, show)
        seconds = time.monotonic() - begun
    print()
    for problem in found.problems:
        print(problem)
    wrong = bool(found.lost or found.bits or found.problems)
    print(f"{found.kills} kills ({', '.join(f'{n} {when} training' for when, n in found.when.items())})")
    print(f"{found.starts} starts, {found.runs} runs ended, each compared with an undisturbed one")
    print(f"{found.lost} durable steps lost")
    print(f"{found.bits} bits different")
    print(f"{seconds:.0f} seconds")
    print(f"the runs that went wrong are in {folder}" if wrong else "nothing is wrong")
    tree = {**asdict(found), "seed": options.seed, "seconds": round(seconds, 1), "environment": describe(1, 1)}
    write_json(options.json, tree)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
