#!/usr/bin/env bash
# Makes a policy of blocks as the shipped one was made; --help lists the flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
exec .venv/bin/python -m examples.blocks.train "$@"
