#!/usr/bin/env bash
# Trains on the GPU nodes of a SLURM cluster, one process on each node with all of its GPUs, and goes on by itself after
# the time limit and after a preemption. Usage, where jaxlm is on a file system that the nodes see:
#   bash launch/slurm.sh [--dry_run] [SBATCH_FLAGS] -- TRAIN_FLAGS
#   bash launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=24:00:00 -- --config=configs/gpt2.py --workdir=/scratch/gpt2
# Installs into .venv first; PYTHON=... uses that one instead. --dry_run prints the commands and runs none.
#SBATCH --job-name=jaxlm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac

dry_run='' flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --dry_run ]; then dry_run=1; else flags+=("$1"); fi
  shift
done
if [ $# -lt 2 ]; then
  echo "usage: bash launch/slurm.sh [--dry_run] [SBATCH_FLAGS] -- TRAIN_FLAGS (the head of the script says more)" >&2
  exit 2
fi
shift
python=${PYTHON:-.venv/bin/python}
do_() { if [ -n "$dry_run" ]; then printf '%q ' "$@" && echo; else "$@"; fi; }

if [ -n "$dry_run" ] || [ -z "${SLURM_JOB_ID:-}" ]; then # here: submit
  cd "$(dirname "$0")/.."
  [ -n "${PYTHON:-}" ] || do_ bash launch/install.sh cuda # not only where this machine has a GPU
  do_ sbatch ${flags[@]+"${flags[@]}"} launch/slurm.sh -- "$@"
  [ -n "$dry_run" ] || exit 0
else # in the job, whose script is a copy elsewhere
  cd "$SLURM_SUBMIT_DIR"
fi

# 300 s before the time limit SIGTERM goes to the processes alone. This script gets it only when the job is to end
# (scancel), and then does not requeue it.
stop='' code=0
trap 'stop=1' TERM
do_ srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 "$python" -m jaxlm.train "$@" || code=$?
if [ -n "$dry_run" ] || { [ "$code" = 75 ] && [ -z "$stop" ]; }; then # stopped and saved
  do_ scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$code"
