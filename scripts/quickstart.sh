#!/usr/bin/env bash
# From nothing to a policy that does what it could not do before, in about ten minutes on two CPU cores; --help lists the flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m examples.blocks.quickstart "$@"
