#!/usr/bin/env bash
# Lint and tests on 8 fake CPU devices, under 10 minutes on 2 cores. Usage: bash launch/test.sh [--all] [PYTEST_ARGS]
# --all adds what is slow (marked slow): drills, comparisons with other libraries, larger compiles; and one recipe for
# a pod, another one after each commit. Under 35 minutes.
# --pods alone compiles every recipe for a pod, of up to 1,024 chips, and holds it against its docstring; 20 minutes.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
bash launch/install.sh test

select='not slow and not pods'
case "${1:-}" in
--all) select='not pods or in_turn' && shift ;;
--pods) select=pods && shift ;;
esac
# Which recipe for a pod --all compiles: by the number of commits, or of the day in a checkout without its history.
JAXLM_TEST_TURN=$(date +%j)
if [ "$(git rev-parse --is-shallow-repository 2>/dev/null)" = false ]; then
  JAXLM_TEST_TURN=$(git rev-list --count HEAD)
fi
export JAXLM_TEST_TURN
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two workers: compiling, most of the time, uses one core. Each begins with half of the files, in order, and who is
# done takes from the other: most tests find the fixtures of their file made.
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m "$select" "$@"
