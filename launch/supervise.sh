#!/usr/bin/env bash
# Run a job and start it again when that can help: the same command goes on from the last durable step.
#   bash launch/supervise.sh [--restarts N] [--] COMMAND ...
#   bash launch/supervise.sh deepspeed launch/finetune.py --config configs/quickstart.yaml output.run_dir=runs/mine
# Started again: killed ranks (any signal), dead or hung peers (7, 8), ranks that were asked to stop from outside (75).
# Not started again: refused input (2, 3), a machine that lacks something (4), steps that cannot be taken (5), a damaged
# run (6), and what fails N times in a row (default 10) within 20 s each. The first time there is no pause, then 1 s, 2 s, ...
# SIGTERM and SIGINT to this script stop the job, which finishes its step, and end it with 75.
set -uo pipefail

restarts=10
[ "${1:-}" != "--restarts" ] || { restarts="${2:?--restarts needs a number}"; shift 2; }
[ "${1:-}" != "--" ] || shift
[ $# -gt 0 ] || { echo "usage: supervise.sh [--restarts N] [--] COMMAND ..." >&2; exit 2; }

job=""
stopping=""
# Everything the launcher started, whatever has become of the launcher.
sweep() { [ -z "$job" ] || kill -KILL -- "-$job" 2>/dev/null; }
stop() { stopping=yes; [ -z "$job" ] || kill -TERM -- "-$job" 2>/dev/null; }
# The deepspeed command dies at once; its ranks finish their step.
drain() { for _ in $(seq 250); do kill -0 -- "-$job" 2>/dev/null || return; sleep 0.1; done; }
trap stop TERM INT
trap sweep EXIT

failures=0
while :; do
  started=$SECONDS
  # A process group of its own, so that nothing of it is left when it is over.
  setsid "$@" &
  job=$!
  while :; do
    wait "$job"
    code=$?
    kill -0 "$job" 2>/dev/null || break # else a signal to this script ended the wait
  done
  # The deepspeed command ends with 0 when its helper process was killed; then the ranks are still there.
  [ "$code" -ne 0 ] || ! kill -0 -- "-$job" 2>/dev/null || code=137
  [ -z "$stopping" ] || drain
  sweep
  job=""
  lived=$((SECONDS - started))
  [ -z "$stopping" ] || { echo "supervise: stopped; the same command goes on" >&2; exit 75; }
  case $code in
    0) exit 0 ;;
    1 | 2 | 3 | 4 | 5 | 6 | 126 | 127) echo "supervise: exit code $code: starting again cannot help" >&2; exit "$code" ;;
  esac
  if [ "$lived" -ge 20 ]; then failures=0; else failures=$((failures + 1)); fi
  if [ "$failures" -gt "$restarts" ]; then
    echo "supervise: exit code $code, for the $failures. time within 20 s: giving up" >&2
    exit "$code"
  fi
  delay=$((failures < 2 ? 0 : 1 << (failures < 8 ? failures - 2 : 6)))
  echo "supervise: exit code $code after $lived s; starting again in $delay s" >&2
  sleep "$delay" &
  wait $!
  [ -z "$stopping" ] || exit 75
done
