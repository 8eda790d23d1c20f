"""`zo_ds export`, `apply`, `journal` and `diff`: runs as files of scalars, told apart and put on base models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zo_ds.config.load import validate
from zo_ds.config.schema import ModelConfig, PeftConfig
from zo_ds.engine.resume import JOURNAL
from zo_ds.errors import ConfigError, CorruptRunError, MachineError
from zo_ds.files import write_atomically
from zo_ds.journal.history import History, read_journal
from zo_ds.journal.records import StepRecord
from zo_ds.journal.stream import to_bytes
from zo_ds.trainer.revisit import rebuild, save_rebuilt
from zo_ds.trainer.run_dir import changes, read_result, read_yaml_file
from zo_ds.trainer.start import from_text, read_start, to_text

MAX_COEFFICIENT = 1.0
MAX_STEPS = 10_000_000


def read_history(path: Path) -> History:
    """The journal of a run directory, or in a journal file.

    Raises:
        DataError, CorruptRunError: see `read_journal`.
    """
    return read_journal(path / JOURNAL if (path / JOURNAL).is_dir() else path)


def journal_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A journal as plain data: for each segment its header, then its records; last what is damaged."""
    history = read_history(path)
    for segment in history.segments:
        yield segment.header.to_json()
        for record in segment.records:
            yield record.to_json()
    for problem in () if history.whole else history.problems:
        yield {"damage": problem}


def export_journal(run: Path, target: Path) -> dict[str, Any]:
    """Write the fine-tune that a run kept as one file: base identity and scalars; and a computed prefix's first values.

    Returns:
        file, steps, bytes, model_bytes (of the same weights in full), ratio.

    Raises:
        DataError, CorruptRunError: the run cannot be read.
        MachineError: the file cannot be written.
    """
    result = read_result(run)
    history = read_journal(run / JOURNAL)
    steps = int(result["best_step"]) if result is not None else history.steps
    digest = result["weights_sha256"] if result is not None else None
    shared = {"steps": steps, "weights_sha256": digest}
    begun = to_text(read_start(run))
    raw = to_bytes(history, 0, steps, shared if begun is None else {**shared, "start": begun})
    try:
        write_atomically(target, raw)
    except OSError as error:
        raise MachineError(
            f"cannot write the file: {error.strerror}", where=str(target), remedy="choose another place"
        ) from error
    model = sum(info.numel * info.dtype.itemsize for info in history.header.parameters)
    return {
        "file": str(target),
        "steps": steps,
        "bytes": len(raw),
        "model_bytes": model,
        "ratio": math.floor(model / len(raw)),
    }


def apply_journal(file: Path, model: str | None, save_to: Path | None) -> dict[str, Any]:
    """Put a shared fine-tune on its base model.

    Args:
        file: as written by `export_journal`.
        model: folder, hub name or catalog name of the base model; None: the one that the file names.
        save_to: folder for the tuned model; None: only check.

    Returns:
        steps, weights_sha256, base_sha256, seconds.

    Raises:
        DataError, CorruptRunError: the file cannot be read, or this is another base model.
        ConfigError: the file does not say which model, or its coefficients could be larger than is believed.
    """
    history = read_history(file)
    if history.problems or history.steps != history.segments[-1].end_step:
        raise history.damage(history.steps)
    caps = [segment.header.coefficient_cap for segment in history.segments]
    if max(caps) > MAX_COEFFICIENT or history.steps > MAX_STEPS:
        raise CorruptRunError(
            f"the journal allows coefficients up to {max(caps):g} in {history.steps} steps",
            where=str(file),
            why=f"shared journals are applied up to {MAX_COEFFICIENT:g} and {MAX_STEPS} steps",
            remedy="ask its author; `zo_ds replay` of the whole run directory has no such limit",
        )
    source = dict(history.header.base_model or {})
    classes, peft = int(source.pop("classes", 0)), validate(PeftConfig, source.pop("peft", {}), where=str(file))
    source = source | ({"path": model, "revision": None} if model is not None else {})
    if "path" not in source:
        raise ConfigError("the journal does not name its base model", where=str(file), remedy="give it with --model")
    config = validate(ModelConfig, source, where=str(file))
    shared = history.header.shared or {}
    if shared.get("steps", history.steps) != history.steps:
        raise CorruptRunError(
            f"the file has {history.steps} of its {shared['steps']} steps",
            where=str(file),
            remedy="get it again: its end is missing",
        )
    begun = from_text(shared.get("start"), str(file))
    built = rebuild(config, peft, classes, history, history.steps, begun=begun)
    if shared.get("weights_sha256") not in (None, built.replayed.weights_sha256):
        raise CorruptRunError(
            "the file leads to other weights than its author had",
            where=str(file),
            why=f"SHA-256 {built.replayed.weights_sha256[:16]}..., not {shared['weights_sha256'][:16]}...",
            remedy="ask its author; nothing was saved",
        )
    if save_to is not None:
        save_rebuilt(built, history, save_to, history.steps)
    return {
        "steps": history.steps,
        "weights_sha256": built.replayed.weights_sha256,
        "base_sha256": history.header.base_sha256,
        "seconds": round(built.seconds, 3),
    }


def diff_runs(one: Path, other: Path) -> dict[str, Any]:
    """Where two runs part.

    Returns:
        settings: keys that differ, with both values (run directories only); identity: what of base model, parameters
        and constants differs; steps: of both; first_difference: the first step whose record differs, with both
        records, None if one continues the other; equal: whether both hold the same steps.
    """
    first, second = read_history(one), read_history(other)
    ours, theirs = first.records(), second.records()
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if _key(a) != _key(b)), None)
    parted = None if at is None else {"step": at, "one": ours[at].to_json(), "other": theirs[at].to_json()}
    settings: dict[str, Any] = {}
    if (one / "resolved.yaml").is_file() and (other / "resolved.yaml").is_file():
        for group in changes(one, read_yaml_file(other / "resolved.yaml")):
            settings |= {difference.key: [difference.old, difference.new] for difference in group}
    identity = [
        name
        for name, a, b in (
            ("base_sha256", first.header.base_sha256, second.header.base_sha256),
            ("parameters", first.header.parameters, second.header.parameters),
            *((key, value, second.header.maths()[key]) for key, value in first.header.maths().items()),
        )
        if a != b
    ]
    return {
        "equal": parted is None and len(ours) == len(theirs) and not identity,
        "settings": settings,
        "identity": identity,
        "steps": [len(ours), len(theirs)],
        "first_difference": parted,
    }


def _key(record: StepRecord) -> str:
    return repr((record.update, record.skip, record.clean_loss, record.spread))
