#!/usr/bin/env bash
# Installs jaxlm on a machine with NVIDIA GPUs, one to eight, and trains on all of them with one process.
# Usage: bash launch/gpu_node.sh [--dry_run] [--no_restart] -- TRAIN_FLAGS
#   bash launch/gpu_node.sh -- --config=configs/gpt2.py --config.data.path=data/mine --workdir=runs/mine
# A run that was stopped by a signal and has saved (exit code 75) is started again and goes on, but for a signal that
# this script got too (Ctrl-C), and for --no_restart. CUDA_VISIBLE_DEVICES=0,1 takes fewer GPUs; PYTHON=... uses that
# one and installs nothing; --dry_run prints the commands and runs none.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."

dry_run='' restart=1
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --no_restart) restart= ;;
    *) break ;;
  esac
  shift
done
if [ "${1:-}" != -- ] || [ $# -lt 2 ]; then
  bash launch/gpu_node.sh --help >&2
  exit 2
fi
shift
train=("${PYTHON:-.venv/bin/python}" -m jaxlm.train "$@")
if [ -n "$dry_run" ]; then
  [ -n "${PYTHON:-}" ] || echo "bash launch/install.sh"
  printf '%q ' "${train[@]}" && echo
  exit 0
fi
if ! nvidia-smi -L; then
  echo "no NVIDIA GPU here; without one: $(printf '%q ' "${train[@]}")" >&2
  exit 2
fi
[ -n "${PYTHON:-}" ] || bash launch/install.sh

# In the background, so that a signal to this script alone is passed on at once.
stop=
trap 'stop=1; kill -TERM "$job" 2>/dev/null || true' INT TERM
while :; do
  "${train[@]}" &
  job=$! code=0
  wait "$job" || code=$?
  while [ -n "$stop" ] && [ "$code" -gt 128 ]; do # the signal may have ended the wait alone: wait again
    again=0
    wait "$job" 2>/dev/null || again=$?
    [ "$again" != 127 ] || break # no: the run had ended
    code=$again
  done
  if [ "$code" != 75 ] || [ -z "$restart" ] || [ -n "$stop" ]; then exit "$code"; fi
  echo "stopped and saved: starting it again"
  sleep "${POLL:-10}"
done
