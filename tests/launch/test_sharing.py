"""A fine-tune as a file of scalars: written, read, compared, checked, and put on its base model again."""

from __future__ import annotations

import json
import math
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import jobs
from tests.launch.zygote import Start, Zygote
from zo_ds.journal.binary import decode_segments, encode_header, encode_record, record_size
from zo_ds.journal.history import read_journal
from zo_ds.journal.records import StepRecord

pytestmark = pytest.mark.launch
Call = Callable[..., jobs.Outcome]
SETTINGS = {
    "zeroth_order": {"weight_decay": 0.1},
    "training": {"eval_every": 8},
    "journal": {"hash_every": 5, "snapshot_replay_s": 1e-9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    jobs.make_recipe(folder, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def zo_ds(folder: Path) -> Iterator[Call]:
    """Runs commands; every module-wide folder has a finished run."""
    with Zygote(jobs.environment()) as zygote:

        def call(*arguments: str | Path) -> jobs.Outcome:
            texts = [folder / "out.txt", folder / "err.txt"]
            for text in texts:
                text.write_text("")
            code = zygote.run(Start([str(argument) for argument in arguments], folder))
            return jobs.Outcome(code, *(text.read_text() for text in texts))

        for name, changes in (
            ("run", ()),
            ("again", ()),
            ("longer", ("training.steps=25",)),
            ("other", ("data.seed=1",)),
        ):
            done = call("train", "recipe.yaml", f"output.run_dir={name}", *changes)
            assert done.code == 0, done.err
        yield call


@pytest.fixture(scope="module")
def shared(zo_ds: Call, folder: Path) -> Path:
    done = zo_ds("export", "run", "tuned.zoj", "--as", "journal")
    assert done.code == 0, done.err
    return folder / "tuned.zoj"


def edited(run: Path, change: Callable[[StepRecord], StepRecord] = lambda record: record, **header: Any) -> bytes:
    """A journal that says something else, with checksums that are right."""
    segments = read_journal(run / "journal").segments
    raw, chain = encode_header(replace(segments[0].header, **header))
    for record in [record for segment in segments for record in segment.records]:
        part, chain = encode_record(change(record), segments[0].header, chain)
        raw += part
    return raw


def tamper(step: int) -> Callable[[StepRecord], StepRecord]:
    """Let a step's first coefficient be another."""

    def change(record: StepRecord) -> StepRecord:
        first, *rest = record.update.terms
        terms = (replace(first, coefficient=first.coefficient / 2), *rest)
        return replace(record, update=replace(record.update, terms=terms)) if record.step == step else record

    return change


def copy(folder: Path, target: Path, journal: bytes | None = None) -> Path:
    """A run to be damaged; with another journal, if one is given."""
    shutil.copytree(folder / "run", target)
    if journal is not None:
        for file in (target / "journal").iterdir():
            file.unlink()
        (target / "journal" / "000000.zoj").write_bytes(journal)
        shutil.rmtree(target / "snapshots")
    return target


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# journal


def test_journal_as_lines(zo_ds: Call, folder: Path, shared: Path) -> None:
    lines = [json.loads(line) for line in zo_ds("journal", "run").out.splitlines()]
    steps = [line for line in lines if "step" in line]
    assert lines[0]["format"] == "zo_ds journal"
    assert lines[0]["base_model"]["path"] == str(folder / "model")
    assert len(lines) - len(steps) == len(list((folder / "run" / "journal").iterdir())) > 1
    assert steps == jobs.records(folder / "run")
    assert [line["step"] for line in steps if line["state_hash"]] == [0, 5, 10, 15]
    head, *rest = (json.loads(line) for line in zo_ds("journal", shared).out.splitlines())
    assert rest == steps[: jobs.result(folder / "run")["best_step"]]
    result = jobs.result(folder / "run")
    promise = {"steps": result["best_step"], "weights_sha256": result["weights_sha256"]}
    assert head == {**lines[0], "zo_ds": head["zo_ds"], "shared": promise}


def test_damage_is_the_last_line_of_a_journal(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    raw = bytearray(edited(folder / "run"))
    raw[-100] ^= 1
    done = zo_ds("journal", copy(folder, tmp_path / "run", bytes(raw)))
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0
    assert "step 18: its checksum does not continue the chain" in lines[-1]["damage"]
    assert len(lines) == 1 + 18 + 1
    assert zo_ds("journal", tmp_path / "none").code == 3


# audit


def test_audit_of_a_sound_run(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    done = zo_ds("audit", "run")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"steps": 20, "hashes": 4, "problems": []}
    assert zo_ds("audit", copy(folder, tmp_path / "run", edited(folder / "run"))).code == 0
    assert zo_ds("audit", tmp_path).code == 3


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 8
    file.write_bytes(raw)


def other_result(run: Path) -> None:
    tree = jobs.result(run)
    tree["weights_sha256"] = "0" * 64
    (run / "result.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: flip(run / "journal" / "000001.zoj", -1), "000001.zoj: step"),
        (lambda run: flip(run / "journal" / "000000.zoj", 40), "000000.zoj: the header's checksum is wrong"),
        (lambda run: (run / "journal" / "000001.zoj").unlink(), "does not continue the segment before it"),
        (lambda run: flip(max((run / "snapshots").iterdir()) / "model.safetensors", -1), "block 0 of 1 has another"),
        (lambda run: flip(max((run / "snapshots").iterdir()) / "manifest.json", 9), "COMMIT names another manifest"),
        (other_result, "the replayed weights are not those in result.json"),
    ],
    ids=["record", "header", "segment", "snapshot", "manifest", "result"],
)
def test_audit_of_a_damaged_run(
    damage: Callable[[Path], None], words: str, zo_ds: Call, folder: Path, tmp_path: Path
) -> None:
    damage(copy(folder, tmp_path / "run"))
    done = zo_ds("audit", tmp_path / "run")
    assert done.code == 6
    assert words in done.out + done.err


def test_a_coefficient_that_somebody_changed_is_found(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    run = copy(folder, tmp_path / "run", edited(folder / "run", tamper(7)))
    done = zo_ds("audit", run)
    found = json.loads(done.out)
    assert done.code == 6
    assert "before step 10" in found["problems"][0]
    assert "2 of 4 hashes differ" in found["problems"][0]
    replayed = zo_ds("replay", run)
    assert replayed.code == 6
    assert "the replayed weights are not those of the run" in replayed.err


def test_a_record_that_was_being_written_is_no_damage(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    run = copy(folder, tmp_path / "run", edited(folder / "run")[:-5])
    (run / "result.json").unlink()
    done = zo_ds("audit", run)
    assert json.loads(done.out) == {"steps": 19, "hashes": 4, "problems": []}
    assert done.code == 0


def test_a_snapshot_of_other_weights_is_found(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    for name in ("run", "other"):
        shutil.copytree(folder / name, tmp_path / name)
    newest = max((tmp_path / "run" / "snapshots").iterdir())
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "other" / "snapshots" / newest.name, newest)
    done = zo_ds("audit", tmp_path / "run")
    assert done.code == 6
    assert newest.name in done.out


# diff


def test_diff_of_runs(zo_ds: Call, shared: Path) -> None:
    same = zo_ds("diff", "run", "again")
    assert same.code == 0
    assert json.loads(same.out) == {
        "equal": True, "settings": {}, "identity": [], "steps": [20, 20], "first_difference": None,
    }  # fmt: skip
    longer = zo_ds("diff", "run", "longer")
    assert longer.code == 1
    assert json.loads(longer.out)["steps"] == [20, 25]
    assert json.loads(longer.out)["first_difference"] is None
    other = zo_ds("diff", "run", "other")
    found = json.loads(other.out)
    assert other.code == 1
    assert found["settings"] == {"data.seed": [0, 1]}
    assert found["identity"] == []
    assert found["first_difference"]["step"] == 0
    assert found["first_difference"]["one"] != found["first_difference"]["other"]
    assert json.loads(zo_ds("diff", shared, "longer").out)["first_difference"] is None


def test_diff_names_the_first_step_and_the_identity(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    run = copy(folder, tmp_path / "run", edited(folder / "run", tamper(7), base_sha256="0" * 64))
    done = zo_ds("diff", "run", run)
    assert done.code == 1
    assert json.loads(done.out)["identity"] == ["base_sha256"]
    assert json.loads(done.out)["first_difference"]["step"] == 7


# export and apply


def test_a_shared_fine_tune_is_small_and_gives_the_same_model(zo_ds: Call, folder: Path, shared: Path) -> None:
    told = json.loads(zo_ds("export", "run", "tuned.zoj", "--as", "journal").out)
    result = jobs.result(folder / "run")
    assert told["steps"] == result["best_step"]
    assert told["bytes"] == shared.stat().st_size
    assert told["ratio"] == told["model_bytes"] // told["bytes"]
    assert told["model_bytes"] == sum(t.nbytes for t in load_file(folder / "model" / "model.safetensors").values())
    done = zo_ds("apply", shared, "--save", "applied")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["steps"], found["weights_sha256"]) == (result["best_step"], result["weights_sha256"])
    assert same_weights(folder / "applied", folder / "run" / "model")
    assert not same_weights(folder / "applied", folder / "model")


def test_the_base_model_may_lie_elsewhere(zo_ds: Call, folder: Path, shared: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "moved")
    done = zo_ds("apply", shared, "--model", tmp_path / "moved")
    assert done.code == 0, done.err
    assert json.loads(done.out)["weights_sha256"] == jobs.result(folder / "run")["weights_sha256"]


def test_another_base_model_is_refused(zo_ds: Call, folder: Path, shared: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = zo_ds("apply", shared, "--model", tmp_path / "model", "--save", tmp_path / "applied")
    assert done.code == 6
    assert "these are not the weights the run started from" in done.err
    assert not (tmp_path / "applied").exists()


def test_files_that_are_not_applied(zo_ds: Call, folder: Path, shared: Path, tmp_path: Path) -> None:
    raw = shared.read_bytes()
    middle = len(raw) - 150
    cases: Mapping[str, tuple[bytes | None, int, str]] = {
        "flipped": (raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :], 6, "cannot be read at step"),
        "header-cut": (raw[:100], 6, "the header is incomplete"),
        "text": (b"{}\n", 6, "the journal is damaged"),
        "empty": (b"", 6, "the header is incomplete"),
        "missing": (None, 3, "No such file"),
        "cap": (edited(folder / "run", coefficient_cap=1.5), 6, "allows coefficients up to 1.5"),
        "nameless": (edited(folder / "run", base_model=None), 2, "does not name its base model"),
        "model": (edited(folder / "run", base_model={"path": "missing", "classes": 2}), 3, "missing"),
    }
    for name, (content, code, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = zo_ds("apply", tmp_path / name)
        assert (name, done.code) == (name, code), done.err
        assert words in done.err


NOT_WHOLE = (lambda raw: raw[:-1], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("change", NOT_WHOLE, ids=["cut", "flipped"])
def test_a_file_that_is_not_whole_is_refused(
    change: Callable[[bytes], bytes], zo_ds: Call, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(change(shared.read_bytes()))
    done = zo_ds("apply", tmp_path / "f")
    assert done.code == 6
    assert "cannot be read at step" in done.err


def test_a_file_that_lost_its_last_steps_is_refused(zo_ds: Call, shared: Path, tmp_path: Path) -> None:
    (segment,) = decode_segments(shared.read_bytes())
    size = record_size(segment.header)
    (tmp_path / "f").write_bytes(shared.read_bytes()[: -2 * size])
    done = zo_ds("apply", tmp_path / "f")
    assert done.code == 6
    steps = len(segment.records)
    assert f"the file has {steps - 2} of its {steps} steps" in done.err


def test_export_where_nothing_can_be_written(zo_ds: Call, folder: Path) -> None:
    done = zo_ds("export", "run", "nowhere/tuned.zoj")
    assert done.code == 4
    assert "cannot write the file" in done.err
    assert zo_ds("export", "model", "tuned2.zoj").code == 3
    assert not (folder / "tuned2.zoj").exists()


# Files by somebody who means harm


def harmful(head: bytes, chain: int, directions: int, coefficient: float, decay: float = 0.0) -> bytes:
    """A journal of one step, with checksums that are right; the program itself would not write it."""
    body = struct.pack("<IHHdddQ", 0, directions, 1, decay, 0.0, 1.0, 0)
    body += struct.pack(f"<{directions}f", *[coefficient] * directions)
    return head + body + struct.pack("<I", zlib.crc32(body, chain))


def test_only_a_decay_that_is_one_is_believed(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    header = read_journal(folder / "run" / "journal").header
    for decay, code in ((0.5, 0), (2.0, 6), (-1e30, 6), (math.nan, 6)):
        (tmp_path / "f").write_bytes(harmful(*encode_header(header), header.num_directions, 0.0, decay))
        done = zo_ds("apply", tmp_path / "f")
        assert (decay, done.code) == (decay, code), done.err


def test_a_cap_that_is_not_a_number_is_refused(zo_ds: Call, folder: Path, tmp_path: Path) -> None:
    header = read_journal(folder / "run" / "journal").header
    tree = {**header.to_json(), "coefficient_cap": math.nan}
    body = json.dumps(tree).encode()
    raw = struct.pack("<8sIIII", b"ZODSJRNL", 2, len(body), 44 + 4 * header.num_directions, 0) + body
    chain = zlib.crc32(raw)
    first = raw + struct.pack("<I", chain)
    second, chain = encode_header(replace(header, segment=1, chain=chain, coefficient_cap=1e30))
    (tmp_path / "f").write_bytes(first + harmful(second, chain, header.num_directions, 1e29))
    assert zo_ds("apply", tmp_path / "f").code == 6
