"""Compare methods on a real model and real data at the same budget of forwards, each with a tuned learning rate.

    python tools/study.py configs/studies/sentiment.yaml [--jobs 2] [--only METHOD] [--dry-run] [--work DIR]
                          [--csv PATH] [--json PATH] [--plot PATH]

For every method of the study: a run with each learning rate of its grid on the first seed, then runs with the one of
the least dev loss on the other seeds. Runs are processes with one thread; a finished one is not taken again, so that
the same command goes on after a kill. With all runs there, the command only reports:

    --csv    every score on the dev set of every run
    --json   per method what it reached and after how many forwards, the whole grid, machine and commit
    --plot   dev loss and accuracy against forwards, a band over seeds (needs matplotlib)

`--only` restricts what is run; the report has all methods that are finished.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import write_json
from study_plan import Planned, Study, plan, read_study
from study_plot import draw, figure_class
from study_report import chosen_outcomes, csv_text, tables, tree
from study_runs import Outcome, Runner, commit, forwards_left, known_runs, open_grid, read_all

from zo_ds.errors import ConfigError, StoppedError, ZODSError
from zo_ds.files import write_atomically
from zo_ds.trainer.environment import describe


def main() -> int:
    """Read, run, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the runs; default: runs/studies/NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", action="append", metavar="METHOD", help="run this method; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their forwards, run nothing")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    # A job that is stopped ends its runs as one that is interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _act(options)
    except KeyboardInterrupt:
        error: ZODSError = StoppedError("stopped, as asked", remedy="the same command goes on from here")
    except ZODSError as found:
        error = found
    else:
        return 0
    print(f"\n{error}", file=sys.stderr)
    return error.exit_code


def _act(options: argparse.Namespace) -> None:
    study = read_study(options.study)
    methods = plan(study, options.study)
    picked = _picked(methods, options.only)
    work = options.work or Path("runs") / "studies" / options.study.stem
    if options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}", where="command line", remedy="run one or more at a time")
    if options.plot is not None:
        figure_class()  # missed now rather than after hours
    if options.dry_run:
        print(_preview(picked, read_all(picked, work)))
        return
    live = sys.stdout.isatty()
    Runner(picked, work, options.jobs, _say, _show if live else None).run()
    _report(study, methods, read_all(methods, work), options)


def _picked(methods: Sequence[Planned], names: Sequence[str] | None) -> list[Planned]:
    known = [planned.name for planned in methods]
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"the study has no method '{name}'", where="--only", remedy=f"use one of {', '.join(known)}"
            )
    return [planned for planned in methods if not names or planned.name in names]


def _preview(methods: Sequence[Planned], done: dict[str, Outcome]) -> str:
    lines = []
    for planned in methods:
        size = f"{planned.steps} steps, {planned.forwards} forwards"
        for run in known_runs(planned, done):
            state = "done" if run.name in done else "to do"
            lines.append(f"{state:<6}{run.method} lr {run.lr:g} seed {run.seed}: {size}")
        if open_grid(planned, done):
            lines += [f"{'to do':<6}{planned.name} lr (chosen) seed {seed}: {size}" for seed in planned.seeds[1:]]
    total = sum(planned.runs * planned.forwards for planned in methods)
    left = sum(forwards_left(planned, done) for planned in methods)
    return "\n".join([*lines, f"{total:,} forwards in all, {left:,} to do"])


def _say(line: str) -> None:
    print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)


def _show(line: str) -> None:
    print(f"\r\033[K{line}", end="", flush=True)


def _report(study: Study, methods: Sequence[Planned], done: dict[str, Outcome], options: argparse.Namespace) -> None:
    print(f"\n{tables(study, methods, done)}")
    if options.csv is not None:
        write_atomically(options.csv, csv_text(methods, done))
    if options.json is not None:
        write_json(options.json, tree(study, methods, done, {"commit": commit(), **describe(1, 1)}))
    if options.plot is not None:
        curves = {}
        for planned in methods:
            outcomes = chosen_outcomes(planned, done) or []
            whole = [outcome for outcome in outcomes if outcome.result is not None]
            if whole:
                curves[f"{planned.name} (lr {whole[0].run.lr:g})"] = whole
        draw(curves, options.plot)


if __name__ == "__main__":
    sys.exit(main())
