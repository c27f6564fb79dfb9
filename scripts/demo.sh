#!/usr/bin/env bash
# The shipped policy at work: bash scripts/demo.sh "put the red cube in the blue tray", or --web for a page; --help lists all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m examples.blocks.demo "$@"
