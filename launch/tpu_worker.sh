#!/usr/bin/env bash
# What tpu_pod.sh runs on each worker of a pod. Usage: bash launch/tpu_worker.sh install | start TRAIN_FLAGS | look
# Says "done: HOST" when all went well.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."

case $1 in
  install) # uv, because the machine's own Python may be older than 3.11
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    bash launch/install.sh tpu,gcs
    ;;
  start) # detached, so that a lost connection does not end it; train.lock is held while it runs
    shift
    if ! flock -n train.lock true; then
      echo "$(hostname) is training already; left as it is"
    else
      rm -f train.exit
      # shellcheck disable=SC2016 # for the inner bash
      nohup flock train.lock bash -c '.venv/bin/python -m jaxlm.train "$@"; echo $? >train.exit' train "$@" \
        >>train.log 2>&1 </dev/null &
    fi
    ;;
  look) # "ended: " and not, lost (the machine went down) or training's exit code; process 0 also has a step to show
    if flock -n train.lock true; then
      echo "ended: $(cat train.exit 2>/dev/null || echo lost)"
    else
      echo "ended: not"
    fi
    { grep -s '^step' train.log || true; } | tail -n 1
    ;;
  *)
    exit 2
    ;;
esac
echo "done: $(hostname)"
