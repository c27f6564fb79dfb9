#!/usr/bin/env bash
# Makes a small VLM of the world of blocks; --help lists the flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
exec .venv/bin/python -m examples.blocks.vlm "$@"
