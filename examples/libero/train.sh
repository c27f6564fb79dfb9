#!/usr/bin/env bash
# Trains a policy of one of LIBERO's suites; --help lists the flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
bash examples/libero/setup.sh --venv .venv # policy and simulator in one process
exec .venv/bin/python -m examples.libero.train "$@"
