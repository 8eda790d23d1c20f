"""Nothing that zo_ds reads can run code: no unpickling, no torch.load, no remote code, in a whole life of a run.

`zo_ds import` alone calls torch.load, and that with its restricted unpickler.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import jobs

pytestmark = pytest.mark.launch

WATCHED = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event == "pickle.find_class" else None)
import torch, transformers
from zo_ds.cli import app
def forbidden(*args, **kwargs):
    raise SystemExit("torch.load was called")
torch.load = forbidden
original = transformers.AutoConfig.from_pretrained
def trusting(*args, **kwargs):
    assert not kwargs.get("trust_remote_code"), "remote code is trusted"
    return original(*args, **kwargs)
transformers.AutoConfig.from_pretrained = trusting
for arguments in ARGUMENTS:
    app(args=arguments, standalone_mode=False)
    assert not seen, seen
print("nothing was unpickled")
"""


def test_a_whole_life_of_a_run_unpickles_nothing(tmp_path: Path) -> None:
    recipe = str(jobs.make_recipe(tmp_path, journal={"snapshot_replay_s": 1e-9}))
    arguments = [
        ["train", recipe, "output.run_dir=run", "training.steps=9"],
        ["replay", "run", "--save", "replayed"],
        ["audit", "run"],
        ["journal", "run"],
        ["export", "run", "tuned.zoj"],
        ["apply", "tuned.zoj", "--save", "applied"],
    ]
    script = WATCHED.replace("ARGUMENTS", repr(arguments))
    done = jobs.run([sys.executable, "-c", script], tmp_path)
    assert done.code == 0, done.err
    assert done.out.endswith("nothing was unpickled\n")


def test_import_reads_pickles_with_the_restricted_unpickler_alone(tmp_path: Path) -> None:
    folder = jobs.make_model(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    restricted = "assert kwargs['weights_only'] is True; return loads(*args, **kwargs)"
    script = WATCHED.replace("torch.load = forbidden", "loads, torch.load = torch.load, forbidden")
    script = script.replace('raise SystemExit("torch.load was called")', restricted)
    script = script.replace("ARGUMENTS", repr([["import", "model", "imported"]]))
    done = jobs.run([sys.executable, "-c", script], tmp_path)
    assert done.code == 0, done.err
    assert done.out.endswith("nothing was unpickled\n")
    assert (tmp_path / "imported" / "model.safetensors").is_file()


def test_the_watcher_sees_a_pickle(tmp_path: Path) -> None:
    script = WATCHED.replace(
        "for arguments in ARGUMENTS:", "import pickle; pickle.loads(pickle.dumps(Exception))\nif 1:"
    )
    done = jobs.run(
        [sys.executable, "-c", script.replace("app(args=arguments, standalone_mode=False)", "pass")], tmp_path
    )
    assert done.code == 1
    assert "pickle.find_class" in done.err
