#!/usr/bin/env bash
# A job under Slurm: srun starts one task for each GPU or for each node, and every task is a rank.
#   sbatch [--nodes=4 --ntasks-per-node=8 --gres=gpu:8 ...] launch/slurm.sh --config RECIPE [key=value ...]
# Submit it from the repository. Every node must see the repository, its .venv and the recipe at the same paths.
# Tasks find their GPU by their number on the node: ask for GPUs by --gres; --gpus-per-task would hide the others.
# MASTER_PORT is taken from the environment if it is set there.
# 60 s before the time limit all ranks finish their step and end with 75: then the job is queued again and goes on from
# there, in the same run directory. Other exit codes end the job.
#SBATCH --job-name=zo_ds
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail

refuse() { printf 'slurm.sh: %s\n' "$1" >&2; exit 2; }
usage="usage: sbatch [sbatch options] launch/slurm.sh --config RECIPE [key=value ...]"
[ $# -gt 0 ] || refuse "$usage"
[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no Slurm job; $usage"
# Slurm runs a copy of this file, so that its own place tells nothing.
root="${SLURM_SUBMIT_DIR:-$PWD}"
[ -f "$root/launch/finetune.py" ] || refuse "no launch/finetune.py in $root; run sbatch from the repository"
per_node="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}"
[ "$SLURM_NTASKS" -eq $((per_node * ${SLURM_JOB_NUM_NODES:-1})) ] ||
  refuse "$SLURM_NTASKS tasks on ${SLURM_JOB_NUM_NODES:-1} nodes, $per_node on each; give --nodes and --ntasks-per-node"

# shellcheck source=launch/environment.sh
command -v deepspeed >/dev/null || . "$root/launch/environment.sh"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${hosts%%$'\n'*}"
# Two jobs that share a node get different ports; below the range that the kernel gives to outgoing connections.
export MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
export LOCAL_WORLD_SIZE="$per_node"
# Newer versions of srun do not take this over from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# shellcheck disable=SC2016 # the task expands it, not this shell
task='export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"; exec python "$@"'
# Cancelling a job sends SIGTERM here too, the signal before the time limit goes to the tasks alone.
cancelled=""
trap 'cancelled=yes' TERM
code=0
# Not bound to cores: parallel.threads=auto divides the cores of the node among its ranks, and would do so twice.
srun --kill-on-bad-exit=1 --cpu-bind=none bash -c "$task" task "$root/launch/finetune.py" "$@" || code=$?
if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then
  echo "slurm.sh: stopped after a whole step; the job is queued again" >&2
  scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: not possible here; the same sbatch command goes on" >&2
fi
exit "$code"
