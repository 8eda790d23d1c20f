"""Checkpoints of .bin files become folders with safetensors; what is no plain one is refused, and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.conftest import small_files
from tests.launch import jobs
from tests.unit.families import family
from zo_ds import cli
from zo_ds.config.schema import ModelConfig
from zo_ds.errors import ConfigError, DataError, MachineError
from zo_ds.models.load import load_model
from zo_ds.stores import shards
from zo_ds.stores.resident import fill_in_place
from zo_ds.trainer.importing import import_model

INDEX = "pytorch_model.bin.index.json"


def opt(folder: Path) -> nn.Module:
    """A tiny OPT beside a tokenizer, as a folder without weights."""
    jobs.make_model(folder)
    model = family("opt-125m")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return model


def save(tensors: Any, path: Path, **how: Any) -> Path:
    torch.save(tensors, path, **how)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """With the weights in one file, the embedding twice in it as OPT ties them."""
    model = opt(tmp_path / "source")
    save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    return tmp_path / "source"


def sharded(folder: Path, weights: dict[str, Tensor], **how: Any) -> dict[str, str]:
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    names = list(weights)
    half = len(names) // 2
    parts = {"pytorch_model-00001-of-00002.bin": names[:half], "pytorch_model-00002-of-00002.bin": names[half:]}
    for file, part in parts.items():
        save({name: weights[name].clone() for name in part}, folder / file, **how)
    placed = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 11)[None]).logits
    return found


def loaded(folder: Path, **settings: Any) -> nn.Module:
    found = load_model(ModelConfig(path=str(folder), **settings), 2)
    assert found.source is not None
    fill_in_place(found.module, found.source)
    return found.module


def refused(source: Path, kind: type[Exception] = DataError, **how: Any) -> Any:
    target = source.parent / "target"
    there = target.exists()
    with pytest.raises(kind) as caught:
        import_model(source, target, **how)
    assert target.exists() == there
    assert not list(source.parent.glob(".target*"))
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before-1.6"])
def test_a_file_with_tied_weights(source: Path, tmp_path: Path, archive: bool) -> None:
    weights = family("opt-125m").state_dict()
    save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    found = import_model(source, tmp_path / "target")
    assert found["aliases"] == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    assert found["files"] == ["model.safetensors"]
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert written.keys() == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in written.items())
    assert (found["tensors"], found["bytes"]) == (len(written), sum(tensor.nbytes for tensor in written.values()))
    assert torch.equal(logits(loaded(tmp_path / "target")), logits(family("opt-125m")))


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before-1.6"])
def test_a_sharded_checkpoint(source: Path, tmp_path: Path, archive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("opt-125m")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    sharded(source, weights, _use_new_zipfile_serialization=archive)
    monkeypatch.setattr(shards, "SHARD_BYTES", sum(tensor.nbytes for tensor in weights.values()) // 2 + 1)
    found = import_model(source, tmp_path / "target")
    assert len(found["files"]) > 2
    assert found["files"][-1] == "model.safetensors.index.json"
    assert not (tmp_path / "target" / INDEX).exists()
    assert torch.equal(logits(loaded(tmp_path / "target")), logits(model))


def test_one_file_is_open_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is opened to see what it holds and again to be written, and not for every tensor."""
    placed = sharded(source, family("opt-125m").state_dict())
    opened = list[str]()
    original = torch.load

    def watched(path: Path, **how: Any) -> Any:
        opened.append(path.name)
        return original(path, **how)

    monkeypatch.setattr(torch, "load", watched)
    import_model(source, tmp_path / "target")
    assert opened == [*sorted(set(placed.values())), *sorted(set(placed.values()))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounded_weights(source: Path, tmp_path: Path, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    whole = torch.arange(6, dtype=torch.int64)
    save({"w": torch.randn(4, 4).double(), "h": torch.randn(3).bfloat16(), "n": whole}, source / "pytorch_model.bin")
    before = torch.load(source / "pytorch_model.bin", weights_only=True)
    import_model(source, tmp_path / "target", dtype)
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert all(torch.equal(written[name], before[name].to(wanted)) for name in ("w", "h"))
    assert torch.equal(written["n"], whole)
    settings = json.loads((tmp_path / "target" / "config.json").read_text())
    assert settings.get("dtype", settings.get("torch_dtype")) == dtype
    assert settings["model_type"] == "opt"


def test_views_are_written_one_by_one(source: Path, tmp_path: Path) -> None:
    """Parts of a storage are no aliases; transposed, cut and empty tensors come out plain."""
    base = torch.randn(4, 6)
    views = {"rows": base[:2], "others": base[2:], "turned": base.T, "all": base, "same": base.view(4, 6)}
    empty = {"none": torch.empty(0, 3), "nothing": torch.empty(0, 3), "number": torch.tensor(2.5)}
    save({**views, **empty}, source / "pytorch_model.bin")
    assert import_model(source, tmp_path / "target")["aliases"] == {"same": "all"}
    written = load_file(tmp_path / "target" / "model.safetensors")
    assert written.keys() == {"rows", "others", "turned", "all", *empty}
    assert all(torch.equal(tensor, {**views, **empty}[name]) for name, tensor in written.items())


def test_only_known_text_files_come_along(source: Path, tmp_path: Path) -> None:
    for name in ("merges", "merges.txt", "spiece.model"):
        (source / name).write_text(name)
    for name in ("modeling.py", "training_args.bin", "tf_model.h5", "x.safetensors", ".secret.json", "flax.index.json"):
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    import_model(source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names - {"generation_config.json"} == {
        *("config.json", "model.safetensors", "merges", "merges.txt", "spiece.model"),
        *tokenizer,
    }
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()


def test_nothing_of_a_malicious_pickle_is_run(source: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "opened",)

    weights = family("opt-125m").state_dict()
    for archive in (True, False):
        for bomb in (Bomb(), {**weights, "bomb": Bomb()}):
            save(bomb, source / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
            error = refused(source)
            assert error.exit_code == 3
            assert "nothing was run" in error.why
            # torch's own advice is to run it.
            assert "weights_only" not in str(error)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(source: Path, share: float, archive: bool) -> None:
    path = save(family("opt-125m").state_dict(), source / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    error = refused(source)
    assert (error.exit_code, error.where) == (3, str(path))
    assert error.why


@pytest.mark.parametrize(
    "content", [b"text " * 20, bytes(64), b"PK\3\4" + bytes(60), b"\x80\x02}q\x00.", b"\x80\x02N."]
)
def test_a_file_that_is_no_checkpoint(source: Path, content: bytes) -> None:
    (source / "pytorch_model.bin").write_bytes(content)
    assert refused(source).exit_code == 3


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([torch.ones(2)], "a list, not tensors by name"),
        ({}, "no tensors"),
        ({"state_dict": {"w": torch.ones(2)}}, "'state_dict' is of type dict"),
        ({"w": torch.ones(2), "step": 3}, "'step' is of type int"),
        ({"w": torch.eye(3).to_sparse()}, "'w' is of a kind that safetensors do not hold"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is of a kind"),
        ({"w": torch.empty(2, device="meta")}, "'w' was saved without its values"),
        ({"w": torch.ones(1).expand(10**15)}, "'w' is larger than what the file holds"),
        ({3: torch.ones(2)}, "3 is no name"),
        ({"__metadata__": torch.ones(2)}, "'__metadata__' is no name"),
    ],
)
def test_what_is_not_plain_tensors(source: Path, content: Any, why: str) -> None:
    save(content, source / "pytorch_model.bin")
    assert why in refused(source).why


def first_of(placed: dict[str, str]) -> str:
    return next(iter(placed))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda placed: "{", "cannot be understood"),
        (lambda placed: "[]", "cannot be understood"),
        (lambda placed: '{"weight_map": 3}', "cannot be understood"),
        (lambda placed: '{"weight_map": {}}', "names no files"),
        (lambda placed: json.dumps({"weight_map": {"w": ["a"]}}), "cannot be understood"),
        (lambda placed: json.dumps({"weight_map": {"w": 3}}), "names the file 3"),
        (lambda placed: json.dumps({"weight_map": {**placed, "w": "../other.bin"}}), "'../other.bin', which is not in"),
        (lambda placed: json.dumps({"weight_map": {**placed, "w": "no.bin"}}), "'no.bin', which is not in"),
        (lambda placed: json.dumps({"weight_map": {**placed, "w": placed[first_of(placed)]}}), "'w', and it does not"),
    ],
)
def test_an_index_that_is_wrong(source: Path, change: Callable[[dict[str, str]], str], why: str) -> None:
    placed = sharded(source, family("opt-125m").state_dict())
    save({"w": torch.ones(1)}, source.parent / "other.bin")
    (source / INDEX).write_text(change(placed))
    assert why in refused(source).why


def test_shards_that_hold_the_same_name(source: Path) -> None:
    placed = sharded(source, {"a": torch.ones(1), "b": torch.ones(1)})
    save({"a": torch.ones(1), "b": torch.ones(1)}, source / placed["b"])
    assert "'a' is in an earlier file" in refused(source).why


def test_what_is_missing(source: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "no").what
    assert "no such folder" in refused(source / "config.json").what
    (source / "pytorch_model.bin").rename(tmp_path / "kept")
    assert "no .bin weights" in refused(source).what
    (tmp_path / "kept").rename(source / "pytorch_model.bin")
    for broken in ("{", "3"):
        (source / "config.json").write_text(broken)
        assert refused(source, dtype="float32").where == str(source / "config.json")
    (source / "config.json").unlink()
    assert refused(source).where == str(source / "config.json")


def test_a_target_that_is_there_stays(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("x")
    assert refused(source, ConfigError).exit_code == 2
    assert [path.name for path in target.iterdir()] == ["mine"]
    (target / "mine").unlink()
    target.rmdir()
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError):
        import_model(source, target)
    assert target.is_symlink()


def test_a_full_disk_leaves_nothing(source: Path) -> None:
    with small_files(20_000):
        assert refused(source, MachineError).exit_code == 4


def test_the_folders_above_the_target_are_made(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "a" / "b" / "target")
    assert (tmp_path / "a" / "b" / "target" / "model.safetensors").is_file()


def command(*arguments: Path | str) -> int:
    try:
        cli.main(["import", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert command(source, target, "--dtype", "bfloat16") == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(target)
    assert load_file(target / "model.safetensors")["model.decoder.embed_tokens.weight"].dtype == torch.bfloat16
    assert command(source, target) == 2
    assert command(tmp_path / "no", tmp_path / "other") == 3
    assert "there is no such folder" in capsys.readouterr().err
    assert command(source, tmp_path / "other", "--dtype", "int8") == 2
    assert not (tmp_path / "other").exists()


def test_a_model_with_pickles_only_names_the_command(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_model(ModelConfig(path=str(source)), 2)
    assert f"zo_ds import {source} " in caught.value.remedy
    import_model(source, tmp_path / "target")
    assert loaded(tmp_path / "target") is not None
