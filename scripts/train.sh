#!/usr/bin/env bash
# Two-stage training; bash scripts/train.sh --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m apt.training.launch train "$@"
