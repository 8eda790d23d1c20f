"""What a run says while it runs: log, progress line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO

from zo_ds.engine.engine import StepOutput
from zo_ds.evaluation.accuracy import Evaluation
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
        file = logging.FileHandler(run_dir / ("log.txt" if rank == 0 else f"log-rank{rank}.txt"), encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


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
    """

    def __init__(self, run_dir: Path | None, total_steps: int, *, tensorboard: bool) -> None:
        self._total = total_steps
        self._seconds: list[float] = []
        self._metrics: IO[str] | None = None
        self._board: Any = None
        if run_dir is not None:
            self._metrics = (run_dir / "metrics.jsonl").open("w", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard.writer import SummaryWriter

                self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> Progress:
        """Use it as a context, so that events are flushed whatever happens."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        for sink in (self._metrics, self._board):
            if sink is not None:
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
            "coefficient_rms": float(out.coefficients.square().mean().sqrt()),
            "lr": out.lr,
            "eps": out.eps,
            "forwards_per_s": out.forwards / out.seconds,
            "tokens_per_s": tokens / out.seconds,
            "memory_gib": memory_gib(),
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

    def evaluation(self, step: int, split: str, found: Evaluation, note: str = "") -> None:
        """Report a score after `step` updates."""
        self._emit(split, step, {"accuracy": found.accuracy, "loss": found.loss})
        log.info(
            "%s", f"{split} accuracy {found.accuracy:.4f}, loss {found.loss:.4f} ({found.examples} examples){note}"
        )

    def _eta(self, done: int) -> float:
        recent = sorted(self._seconds[-20:])
        return (self._total - done) * recent[len(recent) // 2]

    def _emit(self, kind: str, step: int, values: dict[str, float], **extra: Any) -> None:
        if self._metrics is not None:
            row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values, **extra}
            # A non-finite loss is shown as such: Python reads NaN and Infinity back.
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
