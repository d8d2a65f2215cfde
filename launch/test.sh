#!/usr/bin/env bash
# Lint and tests on 8 fake CPU devices, under 15 minutes on 2 cores. Usage: bash launch/test.sh [--all] [PYTEST_ARGS]
# --all adds what is slow (marked slow): drills, comparisons with other libraries, larger compiles; under 60 minutes.
# --pods alone compiles every recipe for a pod, of up to 1,024 chips, and holds it against its docstring; 20 minutes.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
bash launch/install.sh test

select='not slow and not pods'
case "${1:-}" in
--all) select='not pods' && shift ;;
--pods) select=pods && shift ;;
esac
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two workers: compiling, most of the time, uses one core. Each begins with half of the files, in order, and who is
# done takes from the other: most tests find the fixtures of their file made.
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m "$select" "$@"
