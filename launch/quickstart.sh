#!/usr/bin/env bash
# From the Python standard library's source to a small model that writes Python, in minutes.
# Usage: bash launch/quickstart.sh [DIR]   (default runs/quickstart; PYTHON=... uses that one and installs nothing)
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
case ${1:-} in -*) bash "$0" --help >&2; exit 2 ;; esac
dir=$(realpath -m "${1:-$(dirname "$0")/../runs/quickstart}")
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || bash launch/install.sh
python=${PYTHON:-.venv/bin/python}
data=$dir/data
run=$dir/model

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/4  Text to tokens: $data"
$python -m jaxlm.data.prepare --input stdlib --output "$data" --tokenizer sentencepiece --val_split documents

say "2/4  Training: $run"
$python -m jaxlm.train --config=configs/quickstart.py --workdir="$run" --config.data.path="$data"

say "3/4  Held-out files: the model beside gzip -9"
$python -m jaxlm.evaluate --workdir="$run" --gzip --json="$run/evaluation.json"

say "4/4  Samples"
$python -m jaxlm.generate --workdir="$run" --max_tokens=120 --temperature=0.7 --num_samples=1 \
  --prompt='import' --prompt='class' --prompt='    def __init__(self'

say "Done"
cat <<END
The run is in $run: config.json, metrics.jsonl (a line for each logged step), checkpoints/, evaluation.json.
The data is in $data: token shards, tokenizer.model, manifest.json.

Try next:
  $python -m jaxlm.generate --workdir=$run --prompt='def main' --temperature=0.5
  $python -m jaxlm.train --config=configs/gpt2.py --dry_run --devices=8                            # a larger one, on paper
  $python -c "import jaxlm; print(jaxlm.load('$run').loss(['import os', 'banana banana']))"
END
