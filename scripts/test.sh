#!/usr/bin/env bash
# Set up what is missing, then run the tests, two files at a time; arguments go to pytest (e.g. -m slow, tests/model, -n 0).
set -euo pipefail
case "${1:-}" in -h | --help) echo 'usage: bash scripts/test.sh [pytest arguments]   (e.g. tests/model, or -m slow)'; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check --quiet . || { echo 'error: run .venv/bin/python -m ruff format' >&2; exit 1; }
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
