#!/usr/bin/env bash
# The tests with the oldest versions that pyproject.toml allows, in an environment of their own:
# $1 or .venv-oldest. The base and the extras that run with it are set to their lower bounds, the
# developer's tools to those of every day.
# On Linux pip takes the default build of PyTorch, several GiB, unless it is installed there already
# or a CPU build is where pip looks.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:-.venv-oldest}
PYTHON=${PYTHON:-python3.11}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$PYTHON" scripts/oldest_versions.py > "$VENV/oldest.txt"
"$VENV/bin/python" -m pip install -q -r "$VENV/oldest.txt"
"$VENV/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
"$VENV/bin/python" -m pytest -n "${JOBS:-2}" --dist worksteal ${PYTEST_ARGS:-}
