"""Snapshots: the weights after a step as a folder that is whole or does not count, and is never believed unchecked.

A snapshot shortens replay and nothing else: base weights and journal give the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_ds.errors import CorruptRunError
from zo_ds.files import discard, make_folder, remove_folder, sync, write_atomically
from zo_ds.stores.base import Stored
from zo_ds.stores.shards import BLOCK, WrittenFile, write_weights

SNAPSHOT_VERSION = 1
_COMMIT, _MANIFEST = "COMMIT", "manifest.json"


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot says of itself.

    Attributes:
        run_id: of the run.
        step: how many steps its weights have seen.
        state_hash: of the trained weights.
        segment, chain: place in the journal where the next step's record belongs.
    """

    run_id: str
    step: int
    state_hash: int
    segment: int
    chain: int


def folder_of(parent: Path, step: int) -> Path:
    """Where the snapshot after so many steps is kept."""
    return parent / f"step-{step:08d}"


def write_snapshot(
    parent: Path,
    info: SnapshotInfo,
    tensors: Sequence[tuple[str, Tensor | Stored]],
    *,
    extras: Callable[[Path], None] | None = None,
    on_read: Callable[[], None] | None = None,
) -> Path:
    """Write a snapshot. It counts from the moment this returns, not before.

    Args:
        parent: folder of all snapshots of the run.
        info: goes into the manifest.
        tensors: (name, tensor) of the whole model; must not change until `on_read` is called.
        extras: writes configuration and tokenizer, so that `from_pretrained` loads the folder.
        on_read: see `zo_ds.stores.shards.write_weights`.

    Raises:
        OSError: the disk refused it, or has not the room; nothing is left behind.
    """
    make_folder(parent)
    needed, free = sum(tensor.nbytes for _, tensor in tensors), shutil.disk_usage(parent).free
    if free < needed + BLOCK:
        raise OSError(28, f"No space left on device ({free / 2**20:.0f} MiB free, {needed / 2**20:.0f} needed)")
    final = folder_of(parent, info.step)
    temporary = parent / f".{final.name}.tmp"
    remove_folder(temporary)
    temporary.mkdir()
    made = False
    try:
        files = write_weights(temporary, tensors, on_read=on_read)
        if extras is not None:
            extras(temporary)
            for file in sorted(temporary.iterdir()):
                if file.name not in _names(files):
                    sync(file)
                    files.append(_measured(file))
        manifest = json.dumps(_manifest(info, files), indent=1).encode()
        write_atomically(temporary / _MANIFEST, manifest)
        if final.exists():
            quarantine(final)
        os.replace(temporary, final)
        made = True
        sync(parent)
        write_atomically(final / _COMMIT, hashlib.sha256(manifest).hexdigest() + "\n")
    except BaseException:
        discard(temporary)
        if made:
            discard(final)
        raise
    return final


def read_info(folder: Path) -> SnapshotInfo:
    """The manifest of a committed snapshot.

    Raises:
        CorruptRunError: it was not finished, or its manifest is damaged.
    """
    return _read_manifest(folder)[0]


def files_of(folder: Path) -> list[WrittenFile]:
    """The files of a committed snapshot, as they were written.

    Raises:
        CorruptRunError: it was not finished, or its manifest is damaged.
    """
    return _read_manifest(folder)[1]


def verify(folder: Path) -> SnapshotInfo:
    """Check every byte of a snapshot.

    Raises:
        CorruptRunError: it was not finished, or something in it is damaged, missing or of another run.
    """
    info, files = _read_manifest(folder)
    for file in files:
        try:
            found = _measured(folder / file.name)
        except OSError as error:
            raise _damaged(folder / file.name, error.strerror or str(error)) from error
        if found.size != file.size:
            raise _damaged(folder / file.name, f"{found.size} bytes, {file.size} were written")
        bad = [n for n, (a, b) in enumerate(zip(found.blocks, file.blocks, strict=True)) if a != b]
        if bad:
            raise _damaged(folder / file.name, f"block {bad[0]} of {len(file.blocks)} has another SHA-256")
    return info


def committed(parent: Path) -> list[Path]:
    """Folders that claim to be whole, newest first."""
    return sorted((f for f in parent.glob("step-????????") if (f / _COMMIT).is_file()), reverse=True)


def quarantine(folder: Path) -> Path:
    """Move a snapshot aside under a name that nobody reads."""
    aside = folder.with_name(f"{folder.name}.{time.time_ns()}.damaged")
    os.replace(folder, aside)
    return aside


def purge(parent: Path, keep: int) -> Iterator[str]:
    """Remove what is not needed: snapshots beyond the newest ``keep``, and unfinished ones.

    Yields:
        What could not be removed, and why.
    """
    good = committed(parent)
    unfinished = [f for f in parent.glob("step-????????") if f not in good]
    for folder in (*good[keep:], *unfinished, *parent.glob(".step-*.tmp")):
        try:
            # First the mark, so that half a folder is never taken for a whole one.
            (folder / _COMMIT).unlink(missing_ok=True)
            remove_folder(folder)
        except OSError as error:
            yield f"{folder}: {error.strerror or error}"


def _names(files: Sequence[WrittenFile]) -> set[str]:
    return {file.name for file in files}


def _manifest(info: SnapshotInfo, files: Sequence[WrittenFile]) -> dict[str, Any]:
    return {
        "format": "zo_ds snapshot",
        "snapshot_version": SNAPSHOT_VERSION,
        "run_id": info.run_id,
        "step": info.step,
        "state_hash": f"{info.state_hash:016x}",
        "journal": {"segment": info.segment, "chain": info.chain},
        "block_bytes": BLOCK,
        "files": [{"name": f.name, "bytes": f.size, "sha256": list(f.blocks)} for f in files],
    }


def _read_manifest(folder: Path) -> tuple[SnapshotInfo, list[WrittenFile]]:
    try:
        raw = (folder / _MANIFEST).read_bytes()
        mark = (folder / _COMMIT).read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise _damaged(folder, f"not finished: {error.strerror}") from error
    if hashlib.sha256(raw).hexdigest() != mark:
        raise _damaged(folder / _MANIFEST, "COMMIT names another manifest")
    tree = json.loads(raw)
    if tree.get("format") != "zo_ds snapshot" or tree["snapshot_version"] != SNAPSHOT_VERSION:
        raise _damaged(
            folder / _MANIFEST,
            f"snapshot_version is {tree.get('snapshot_version')}, this zo_ds reads {SNAPSHOT_VERSION}",
        )
    if tree["block_bytes"] != BLOCK:
        raise _damaged(folder / _MANIFEST, f"block_bytes is {tree['block_bytes']}, this zo_ds reads {BLOCK}")
    files = [WrittenFile(f["name"], f["bytes"], tuple(f["sha256"])) for f in tree["files"]]
    journal = tree["journal"]
    state = int(tree["state_hash"], 16)
    return SnapshotInfo(tree["run_id"], tree["step"], state, journal["segment"], journal["chain"]), files


def _measured(file: Path) -> WrittenFile:
    blocks: list[str] = []
    size = 0
    with file.open("rb", buffering=0) as handle:
        while piece := _read_block(handle.read):
            blocks.append(hashlib.sha256(piece).hexdigest())
            size += len(piece)
    return WrittenFile(file.name, size, tuple(blocks))


def _read_block(read: Callable[[int], bytes | None]) -> bytes:
    parts: list[bytes] = []
    left = BLOCK
    while left and (part := read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _damaged(where: Path, why: str) -> CorruptRunError:
    remedy = "an older one, or the base model, is used instead"
    return CorruptRunError("a snapshot is damaged", where=str(where), why=why, remedy=remedy)
