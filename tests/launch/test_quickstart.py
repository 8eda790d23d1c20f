"""The quickstart itself, shortened: the real model, the real data, the script that users run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch import jobs

pytestmark = [pytest.mark.launch, pytest.mark.network]

SHORT = ["training.steps=3", "training.eval_every=2", "data.dev_examples=16", "data.test_examples=32"]


def test_quickstart_twice_gives_the_same_bits(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        # The second run has what it needs and must not ask any registry.
        offline = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"} if runs else {}
        script = jobs.ROOT / "launch" / "quickstart.sh"
        run_dir = tmp_path / name
        done = jobs.run(["bash", script, f"output.run_dir={run_dir}", *SHORT], tmp_path, timeout=900, **offline)
        assert done.code == 0, done.err
        assert done.out.splitlines()[-1] == str(run_dir)
        assert "step 3/3" in done.out
        runs.append(run_dir)
    one, two = (jobs.result(run) for run in runs)
    assert one["weights_sha256"] == two["weights_sha256"]
    assert one["test_examples"] == 32
    assert one["forwards"] == 27
    assert jobs.records(runs[0]) == jobs.records(runs[1])
    losses = [line.split("loss ")[1].split()[0] for line in done.out.splitlines() if line.startswith("step ")]
    assert 0.8 < float(losses[0]) < 2.0
    shutil.rmtree(tmp_path)
