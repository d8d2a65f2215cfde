#!/usr/bin/env bash
# Lint and tests on 8 fake CPU devices, under 15 minutes on 2 cores. Usage: bash launch/test.sh [--all] [PYTEST_ARGS]
# --all adds what is slow (marked slow): drills, comparisons with other libraries, larger compiles; under 60 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test

select=(-m 'not slow')
if [ "${1:-}" = --all ]; then
  select=()
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two workers: compiling, most of the time, uses one core. Each begins with half of the files, in order, and who is
# done takes from the other: most tests find the fixtures of their file made.
exec .venv/bin/python -m pytest -n 2 --dist worksteal "${select[@]}" "$@"
