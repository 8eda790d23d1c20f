"""Every family of models, whole, with LoRA and with a prefix, under FZOO and MeZO: 20 steps on two ranks, batched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.launch import jobs
from tests.launch.families_job import ADAPTERS, FAMILIES, LRS, STEPS

pytestmark = pytest.mark.launch
TOGETHER = 4
"""Families that one launch goes through, one engine after the other."""
Told = dict[tuple[str, str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Told]:
    """What each rank found, by family, adapter and estimator, of the families that are launched together with one."""

    @cache
    def launched(first: int) -> Told:
        folder = tmp_path_factory.mktemp("families")
        launcher = [jobs.BIN / "deepspeed", "-q", "--num_accelerators", "2", "--master_port", str(jobs.free_port())]
        names = FAMILIES[first : first + TOGETHER]
        command = [*launcher, "--module", "tests.launch.families_job", folder, *names]
        ended = jobs.run(command, jobs.ROOT, 540, OMP_NUM_THREADS="1")
        assert ended.code == 0, ended.out[-3000:] + ended.err[-3000:]
        told: Told = {}
        for rank in range(2):
            for line in (folder / f"rank{rank}.jsonl").read_text().splitlines():
                row = json.loads(line)
                told.setdefault((row["family"], row["peft"], row["estimator"]), []).append(row)
        return told

    return lambda name: launched(FAMILIES.index(name) // TOGETHER * TOGETHER)


@pytest.mark.parametrize("estimator", LRS)
@pytest.mark.parametrize("peft", ADAPTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains(name: str, peft: str, estimator: str, found: Callable[[str], Told]) -> None:
    one, other = found(name)[name, peft, estimator]
    assert one["ranks"] == 2
    assert one["digest"] == other["digest"]
    assert one["losses"] == other["losses"]
    assert len(one["losses"]) == STEPS
    assert all(map(math.isfinite, one["losses"]))
    assert len(set(one["losses"])) == STEPS
    assert one["moved"]
    assert one["skips"] == 0
    # All directions flow through the model together.
    assert one["alone"] == []
    assert (one["trained"] == one["total"]) == (peft == "none")
