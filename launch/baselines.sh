#!/usr/bin/env bash
# Four language models of one text by its characters, and their figures in one table: a Transformer, an LSTM, a masked
# encoder and n-grams. Usage: bash launch/baselines.sh TEXT [DIR]   (default runs/baselines; about 15 minutes on 2 cores;
# PYTHON=... uses that one and installs nothing; what is done is not done again)
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
case ${1:--} in -*) bash "$0" --help >&2; exit 2 ;; esac
text=$(realpath "$1")
dir=$(realpath -m "${2:-$(dirname "$0")/../runs/baselines}")
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || bash launch/install.sh eval
python=${PYTHON:-.venv/bin/python}

[ -f "$dir/data/manifest.json" ] || $python -m jaxlm.data.prepare --input "$text" --output "$dir/data" --tokenizer chars
runs=()
for variant in cpu lstm masked ngram; do
  printf '\n\033[1m%s\033[0m\n' "$variant"
  $python -m jaxlm.train --config="configs/shakespeare_char.py:$variant" --config.data.path="$dir/data" \
    --workdir="$dir/$variant"
  runs+=("--workdir=$dir/$variant")
done
printf '\n\033[1m%s\033[0m\n' "Held-out characters (masked: only those that were hidden, so not to be compared)"
$python -m jaxlm.evaluate "${runs[@]}" --json="$dir/table.json"
