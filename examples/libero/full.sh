#!/usr/bin/env bash
# All of LIBERO at the size of the paper, on GPUs; --help lists the flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
bash examples/libero/setup.sh
bash examples/libero/setup.sh --venv .venv
exec .venv/bin/python -m examples.libero.full "$@"
