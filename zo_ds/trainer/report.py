"""What a run says while it runs: log, progress line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

import torch

from zo_ds.engine.base import StepOutput
from zo_ds.evaluation.evaluate import Evaluation
from zo_ds.files import write_atomically
from zo_ds.journal.records import StepRecord
from zo_ds.trainer.environment import memory_gib

log = logging.getLogger("zo_ds")


def start_logging(rank: int, run_dir: Path | None = None, stream: TextIO | None = None) -> None:
    """Log to the screen on rank 0, and to the run directory on every rank once it is known.

    Errors go to the file only: the command line prints them, last.

    Args:
        rank: of this process.
        run_dir: of the run, if it has one yet.
        stream: the screen, standard output by default.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    if rank == 0:
        screen = logging.StreamHandler(stream or sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        screen.addFilter(lambda record: record.levelno < logging.ERROR)
        log.addHandler(screen)
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)  # a rank on another node may not see rank 0's
        file = logging.FileHandler(run_dir / log_name(rank), encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def log_name(rank: int) -> str:
    """File in the run directory that a rank logs to."""
    return "log.txt" if rank == 0 else f"log-rank{rank}.txt"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Metrics of a run, on rank 0; on other ranks it only counts.

    Args:
        run_dir: where metrics.jsonl and tensorboard/ go; None on ranks that write nothing.
        total_steps: of the run.
        tensorboard: write events too.
        steps_done: rows of an earlier life behind this step are dropped: it is going to be taken again.
    """

    def __init__(self, run_dir: Path | None, total_steps: int, *, tensorboard: bool, steps_done: int = 0) -> None:
        self._total = total_steps
        self._seconds: list[float] = []
        self._complained = False
        self.unreported: list[int] = []
        self._metrics: IO[str] | None = None
        self._board: Any = None
        if run_dir is not None:
            file = run_dir / "metrics.jsonl"
            reported = _drop_rows(file, steps_done)
            self.unreported = [step for step in range(steps_done) if step + 1 not in reported]
            self._metrics = file.open("a", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard.writer import SummaryWriter

                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1)

    def __enter__(self) -> Progress:
        """Use it as a context, so that events are flushed whatever happens."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        for sink in (self._metrics, self._board):
            if sink is not None:
                with suppress(OSError):
                    sink.close()

    def step(self, out: StepOutput, tokens: int) -> None:
        """Report a step.

        Args:
            out: what it did.
            tokens: that went through the model in it, all evaluations and all ranks counted.
        """
        self._seconds.append(out.seconds)
        values: dict[str, float] = {
            "loss": out.clean_loss,
            "spread": out.spread,
            **({"coefficient_rms": float(out.coefficients.square().mean().sqrt())} if out.coefficients.numel() else {}),
            "lr": out.lr,
            "eps": out.eps,
            "forwards_per_s": out.forwards / out.seconds,
            "tokens_per_s": tokens / out.seconds,
            "memory_gib": memory_gib(),
            "sent_bytes": out.sent,
            **{f"{name}_bytes": value for name, value in asdict(out.traffic).items() if value},
            "seconds": out.seconds,
        }
        self._emit("train", out.step + 1, values, skip=out.skip.value if out.skip else None)
        width = len(str(self._total))
        parts = [
            f"step {out.step + 1:>{width}}/{self._total}",
            f"loss {out.clean_loss:.4f}",
            f"spread {out.spread:.2e}",
            f"lr {out.lr:.2e}",
            f"{values['forwards_per_s']:.2f} forwards/s",
            f"{values['tokens_per_s']:.0f} tokens/s",
            f"{values['memory_gib']:.2f} GiB",
            f"ETA {clock(self._eta(out.step + 1))}",
        ]
        log.info("%s%s", " | ".join(parts), f" | SKIPPED: {out.skip.value}" if out.skip else "")

    def recorded(self, record: StepRecord, lr: float, eps: float) -> None:
        """Report a step that is in the journal, but whose process was killed before it could."""
        coefficients = torch.tensor([term.coefficient for term in record.update.terms] or [0.0])
        values = {
            "loss": record.clean_loss,
            "spread": record.spread,
            "coefficient_rms": float(coefficients.square().mean().sqrt()),
            "lr": lr,
            "eps": eps,
        }
        self._emit("train", record.step + 1, values, skip=record.skip.value if record.skip else None)

    def event(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Put something else that happened after `step` updates into the metrics."""
        self._emit(kind, step, values)

    def evaluation(self, step: int, split: str, found: Evaluation) -> None:
        """Put a score after `step` updates into the metrics."""
        self._emit(split, step, dict(found.values))

    def _eta(self, done: int) -> float:
        recent = sorted(self._seconds[-20:])
        return (self._total - done) * recent[len(recent) // 2]

    def _emit(self, kind: str, step: int, values: dict[str, float], **extra: Any) -> None:
        try:
            if self._metrics is not None:
                row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values, **extra}
                # A non-finite loss is shown as such: Python reads NaN and Infinity back.
                self._metrics.write(json.dumps(row) + "\n")
                self._metrics.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            # What the run needs is in the journal, which has its space.
            if not self._complained:
                log.warning("%s", f"metrics are not written: {error.strerror}; training goes on")
            self._complained = True


def _drop_rows(file: Path, steps_done: int) -> set[int]:
    """Forget what is going to happen again; which training steps have a row."""
    if not file.exists():
        return set()
    kept, reported = [], set()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a row that a killed process was writing
        # Whoever begins reports the zero-shot score again.
        if row["step"] <= steps_done and (steps_done or row["kind"] != "test"):
            kept.append(line + "\n")
            reported |= {row["step"]} if row["kind"] == "train" else set()
    write_atomically(file, "".join(kept))
    return reported
