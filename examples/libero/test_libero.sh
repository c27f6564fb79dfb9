#!/usr/bin/env bash
# Evaluate a policy on LIBERO, LIBERO-PRO or LIBERO-plus, in the simulator's environment, or with the interpreter $PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv-libero/bin/python}"
if [[ " $* " =~ " -h "|" --help " ]] && ! command -v "$python" >/dev/null; then
    python=.venv/bin/python # help needs no simulator
fi
command -v "$python" >/dev/null || { echo "error: there is no $python; run: bash examples/libero/setup.sh" >&2; exit 2; }
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -m examples.libero.evaluate "$@"
