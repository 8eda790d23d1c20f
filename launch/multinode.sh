#!/usr/bin/env bash
# A job on several nodes through the deepspeed launcher, which starts the ranks by pdsh and ssh.
#   bash launch/multinode.sh HOSTFILE --config RECIPE [key=value ...]
# HOSTFILE has a line for each node, with as many slots as it has GPUs: node1 slots=8
# Every node must see the repository, its .venv, the recipe and the working directory at the same paths, and it must be
# possible to reach all of them by ssh without a password. Variables for all nodes (GLOO_SOCKET_IFNAME, ...) stand in
# ~/.deepspeed_env, one NAME=VALUE a line. MASTER_ADDR and MASTER_PORT are taken from the environment if they are set.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
refuse() { printf 'multinode.sh: %s\n' "$1" >&2; exit 2; }
[ $# -gt 1 ] || refuse "usage: multinode.sh HOSTFILE --config RECIPE [key=value ...]"
hostfile="$1"
shift
# The deepspeed command would go on with this machine alone.
[ -f "$hostfile" ] || refuse "no hostfile $hostfile; write one with a line for each node: node1 slots=8"
lines="$(sed 's/#.*//' "$hostfile" | awk 'NF')"
nodes="$(awk '{ print $1 }' <<<"$lines")"
[ -n "$nodes" ] || refuse "$hostfile names no node; it needs a line for each: node1 slots=8"
if bad="$(grep -vE '^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' <<<"$lines")"; then
  refuse "$hostfile: '${bad%%$'\n'*}' is not like: node1 slots=8"
fi

# shellcheck source=launch/environment.sh
command -v deepspeed >/dev/null || . "$root/launch/environment.sh"
options=(-q --hostfile "$hostfile")
if [ "$nodes" = localhost ] || [ "$nodes" = 127.0.0.1 ]; then
  # This machine alone: no ssh to it, and a port that is free.
  free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
  port="${MASTER_PORT:-$(python -c "$free")}"
  options+=(--no_ssh_check --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$port")
else
  command -v pdsh >/dev/null || { echo "multinode.sh: no pdsh here; install it (Debian: pdsh)" >&2; exit 4; }
  # Below the range that the kernel gives to outgoing connections; another one each time, since jobs may share a node.
  options+=(--force_multi --master_port "${MASTER_PORT:-$((10000 + RANDOM % 20000))}")
  [ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
fi
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
exec deepspeed "${options[@]}" "$root/launch/finetune.py" "$@"
