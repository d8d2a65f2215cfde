#!/usr/bin/env bash
# Under- and overfitting: three sizes of a model learn the first 40,000 characters of a text until its last fifth, held
# out, gets no better (early stopping). A table says what each shows, and DIR/fitting.png has their training and
# validation losses. Of Shakespeare: 2.094 with 4,064 parameters (underfits), 1.927 with 227,328 and dropout (fits),
# 2.020 with 3,163,392 (overfits). Usage: bash launch/fitting.sh TEXT [DIR [--config.KEY=VALUE ...]]
# (default runs/fitting; 4 minutes on 2 cores; PYTHON=... uses that one and installs nothing; what is done is not done
# again, so another TEXT needs another DIR)
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
case ${1:--} in -*) bash "$0" --help >&2; exit 2 ;; esac
[ -f "$1" ] || { echo "error: $1: there is no such file; give a text file" >&2; exit 3; }
text=$(realpath "$1")
dir=$(realpath -m "${2:-$(dirname "$0")/../runs/fitting}")
overrides=("${@:3}")
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || bash launch/install.sh eval
python=${PYTHON:-.venv/bin/python}

# Bytes that are no UTF-8 are passed on, so that prepare says what is wrong with them.
first='import sys
with open(sys.argv[1], encoding="utf-8", errors="surrogateescape", newline="") as text:
    part = text.read(40_000)
if len(part) < 10_000:
    sys.exit(f"error: {sys.argv[1]}: {len(part):,} characters; give a text of 10,000 or more")
with open(sys.argv[2], "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
    file.write(part)'
mkdir -p "$dir"
if [ ! -f "$dir/data/manifest.json" ]; then
  $python -c "$first" "$text" "$dir/part.txt" || exit 3
  $python -m jaxlm.data.prepare --input "$dir/part.txt" --output "$dir/data" --tokenizer chars --val_fraction 0.2
fi
common=(--config=configs/shakespeare_char.py:cpu --config.data.path="$dir/data")
common+=(--config.model.embed_ngrams=1 --config.train.ema=0 --config.optim.schedule=constant)
common+=(--config.train.steps=1500 --config.eval.every=25 --config.eval.patience=6 --config.log.every=5)
declare -A sizes=(
  [small]="--config.model.num_layers=1 --config.model.embed_dim=16 --config.model.num_heads=2"
  [medium]="--config.model.num_layers=2 --config.model.embed_dim=96 --config.model.dropout=0.2"
  [large]="--config.model.num_layers=4 --config.model.embed_dim=256"
)
runs=()
for name in small medium large; do
  printf '\n\033[1m%s\033[0m\n' "$name"
  read -ra size <<<"${sizes[$name]}"
  $python -m jaxlm.train "${common[@]}" "${size[@]}" "${overrides[@]}" --workdir="$dir/$name"
  runs+=("--workdir=$dir/$name")
done
printf '\n\033[1m%s\033[0m\n' "Which fits"
$python -m jaxlm.fitting "${runs[@]}" --picture="$dir/fitting.png" --json="$dir/table.json"
