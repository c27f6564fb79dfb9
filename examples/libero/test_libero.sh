#!/usr/bin/env bash
# Evaluate a policy on LIBERO, LIBERO-PRO or LIBERO-plus: in the simulator's environment where it is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv-libero/bin/python
[ -x "$python" ] || python="$(command -v python || command -v python3)" # an environment with everything in one
exec env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -m examples.libero.evaluate "$@"
