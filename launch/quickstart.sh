#!/usr/bin/env bash
# From a bare python3 to a fine-tuned model: environment, model and data (cached), then the job through deepspeed.
#   bash launch/quickstart.sh [key=value ...]
# The last line printed is the run directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
zo_ds prepare configs/quickstart.yaml "$@"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
exec deepspeed -q --num_accelerators 1 --master_port "$port" launch/finetune.py --config configs/quickstart.yaml "$@"
