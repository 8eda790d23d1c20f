"""The scripts that start jobs on clusters, as far as one machine can run them; and the recipes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch import jobs
from zo_ds.config.deepspeed import read_deepspeed, resolve_deepspeed
from zo_ds.config.load import load_config

pytestmark = pytest.mark.launch

LAUNCH = jobs.ROOT / "launch"
RECIPES = sorted((jobs.ROOT / "configs").glob("*.yaml"))
# What srun does: every task with its numbers, and the highest exit code. It says which options it was given.
SRUN = """#!/usr/bin/env bash
options=()
while [[ "$1" == -* ]]; do options+=("$1"); shift; done
echo "${options[*]}" >>"$FAKES/srun.log"
tasks=()
for ((id = 0; id < SLURM_NTASKS; id++)); do
  SLURM_PROCID=$id SLURM_LOCALID=$((id % SLURM_NTASKS_PER_NODE)) "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
  wait "$task"
  ended=$?
  [ "$ended" -le "$code" ] || code=$ended
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$FAKES/scontrol.log"
[ "$1 $2" != "show hostnames" ] || printf 'localhost\\nnode2\\n'
"""
# A rank that tells its numbers, and ends as it is told.
PYTHON = """#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT ${*:2}" >>"$FAKES/ranks.log"
[ -z "${CANCEL:-}" ] || kill -TERM "$(cat "$FAKES/batch")"
exit "${RANK_CODE:-0}"
"""


def fakes(folder: Path, **programs: str) -> Path:
    """A folder for the PATH with these programs in it."""
    made = folder / "fakes"
    made.mkdir()
    for name, text in programs.items():
        (made / name).write_text(text)
        (made / name).chmod(0o755)
    return made


def script(name: str, cwd: Path, *arguments: str | Path, before: Path | None = None, **extra: str) -> jobs.Outcome:
    path = ":".join([*([str(before)] if before else []), str(jobs.BIN), os.environ["PATH"]])
    clean = {"FAKES": str(before)} if before else {}
    return jobs.run(["bash", LAUNCH / name, *arguments], cwd, 300, PATH=path, **clean, **extra)


def slurm_job(**changes: str) -> dict[str, str]:
    given = {
        "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_SUBMIT_DIR": str(jobs.ROOT),
    }
    return {**given, **changes}


def test_slurm_trains(tmp_path: Path) -> None:
    recipe = jobs.make_recipe(tmp_path)
    before = fakes(tmp_path, srun=SRUN, scontrol=SCONTROL)
    arguments = ("--config", recipe, "output.run_dir=slurm", "training.steps=3")
    port = str(jobs.free_port())
    done = script("slurm.sh", tmp_path, *arguments, before=before, **slurm_job(MASTER_PORT=port))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "slurm"
    assert len(jobs.records(tmp_path / "slurm")) == 3
    assert (tmp_path / "slurm" / "log-rank1.txt").exists()
    assert "--kill-on-bad-exit=1" in (before / "srun.log").read_text()


def test_slurm_numbers_the_ranks(tmp_path: Path) -> None:
    before = fakes(tmp_path, srun=SRUN, scontrol=SCONTROL, python=PYTHON)
    nodes = slurm_job(SLURM_NTASKS="4", SLURM_JOB_NUM_NODES="2")
    done = script("slurm.sh", tmp_path, "--config", "a recipe", "name='x y'", before=before, **nodes)
    assert done.code == 0, done.err
    ranks = sorted((before / "ranks.log").read_text().splitlines())
    expected = [f"{rank}/4 {rank % 2}/2 localhost 10123 --config a recipe name='x y'" for rank in range(4)]
    assert ranks == expected
    assert (before / "scontrol.log").read_text() == "show hostnames node[1-2]\n"


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (7, False), (2, False)])
def test_slurm_queues_a_stopped_job_again(code: int, requeued: bool, tmp_path: Path) -> None:
    before = fakes(tmp_path, srun=SRUN, scontrol=SCONTROL, python=PYTHON)
    done = script("slurm.sh", tmp_path, "--config", "r", before=before, **slurm_job(RANK_CODE=str(code)))
    assert done.code == code
    assert ("requeue 40123" in (before / "scontrol.log").read_text()) is requeued


def test_slurm_leaves_a_cancelled_job(tmp_path: Path) -> None:
    """Slurm's SIGTERM for a cancelled job goes to the batch script as well."""
    srun = SRUN.replace("\noptions=()", '\necho "$PPID" >"$FAKES/batch"\noptions=()', 1)
    before = fakes(tmp_path, srun=srun, scontrol=SCONTROL, python=PYTHON)
    done = script("slurm.sh", tmp_path, "--config", "r", before=before, **slurm_job(RANK_CODE="75", CANCEL="yes"))
    assert done.code == 75
    assert "requeue" not in (before / "scontrol.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "usage: sbatch"),
        (["--config", "r"], {"SLURM_JOB_ID": ""}, "this is no Slurm job"),
        (["--config", "r"], {"SLURM_SUBMIT_DIR": "/"}, "run sbatch from the repository"),
        (["--config", "r"], {"SLURM_NTASKS": "3", "SLURM_JOB_NUM_NODES": "2"}, "give --nodes and --ntasks-per-node"),
    ],
)
def test_slurm_refuses(arguments: list[str], changes: dict[str, str], message: str, tmp_path: Path) -> None:
    before = fakes(tmp_path, srun=SRUN, scontrol=SCONTROL)
    done = script("slurm.sh", tmp_path, *arguments, before=before, **slurm_job(**changes))
    assert done.code == 2
    assert message in done.err
    assert not (before / "srun.log").exists()


def test_multinode_trains_on_this_machine(tmp_path: Path) -> None:
    recipe = jobs.make_recipe(tmp_path)
    (tmp_path / "hosts").write_text("# here\n\nlocalhost slots=2\n")
    done = script("multinode.sh", tmp_path, "hosts", "--config", recipe, "output.run_dir=multinode", "training.steps=3")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "multinode"
    assert len(jobs.records(tmp_path / "multinode")) == 3
    assert (tmp_path / "multinode" / "log-rank1.txt").exists()


def test_multinode_gives_the_nodes_to_deepspeed(tmp_path: Path) -> None:
    shows = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$FAKES/given"\n'
    before = fakes(tmp_path, deepspeed=shows, pdsh=shows)
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8 # the second\n")
    done = script("multinode.sh", tmp_path, "hosts", "--config", "a recipe", before=before, MASTER_PORT="12345")
    assert done.code == 0, done.err
    finetune = str(LAUNCH / "finetune.py")
    expected = [
        "-q",
        "--hostfile",
        "hosts",
        "--force_multi",
        "--master_port",
        "12345",
        finetune,
        "--config",
        "a recipe",
    ]
    assert (before / "given").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("hosts", "arguments", "message"),
    [
        (None, [], "usage: multinode.sh HOSTFILE"),
        (None, ["hosts"], "usage: multinode.sh HOSTFILE"),
        (None, ["hosts", "--config", "r"], "no hostfile hosts; write one with a line for each node: node1 slots=8"),
        ("# none\n", ["hosts", "--config", "r"], "hosts names no node"),
        ("node1 slots=8\nnode2\n", ["hosts", "--config", "r"], "'node2' is not like: node1 slots=8"),
        ("node1 slots=0\n", ["hosts", "--config", "r"], "'node1 slots=0' is not like"),
    ],
)
def test_multinode_refuses(hosts: str | None, arguments: list[str], message: str, tmp_path: Path) -> None:
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    done = script("multinode.sh", tmp_path, *arguments)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize(
    ("hosts", "arguments", "message"),
    [
        (None, [], "usage: mpi.sh -n RANKS"),
        (None, ["-n", "2"], "usage: mpi.sh -n RANKS"),
        (None, ["-n", "two", "--config", "r"], "-n needs a number of ranks"),
        (None, ["--config", "r"], "-n is missing"),
        (None, ["--hostfile", "hosts", "--config", "r"], "no hostfile hosts; write one"),
        ("\n", ["--hostfile", "hosts", "--config", "r"], "hosts names no node"),
    ],
)
def test_mpi_refuses(hosts: str | None, arguments: list[str], message: str, tmp_path: Path) -> None:
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    done = script("mpi.sh", tmp_path, *arguments)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_are_valid(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.name == recipe.stem
    training = config.training
    found = resolve_deepspeed(
        read_deepspeed(config.deepspeed),
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        world_size=1,
    )
    if recipe.stem != "quickstart":
        assert config.model.dtype == "bfloat16"
        assert found["zero_optimization"]["offload_param"]["device"] in ("cpu", "nvme")
