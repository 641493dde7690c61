#!/usr/bin/env bash
# The tests with the oldest versions that pyproject.toml allows, in an environment of their own:
# $1 or .venv-oldest. The base and the extras search and report are set to their lower bounds.
# On Linux pip takes the default build of PyTorch, several GiB, unless a CPU build is where it looks.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:-.venv-oldest}
PYTHON=${PYTHON:-python3.11}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$PYTHON" - > "$VENV/oldest.txt" <<'PY'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["search"] + extras["report"]:
    print(line.split(",")[0].replace(">=", "=="))
PY
"$VENV/bin/python" -m pip install -q -r "$VENV/oldest.txt" setuptools \
  pytest pytest-timeout pytest-xdist hypothesis
"$VENV/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
"$VENV/bin/python" -m pip list --format=freeze | grep -iE '^(torch|transformers|lightning|numpy)='
# What needs an extra of its own is left out: its versions are not bound by these.
"$VENV/bin/python" -m pytest -q -n "${JOBS:-2}" --dist worksteal -m "not slow" \
  --ignore tests/test_runtime_lm_eval.py ${PYTEST_ARGS:-}
