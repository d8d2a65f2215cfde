#!/usr/bin/env bash
# Makes .venv with jaxlm in it, for the accelerator that is here. Usage: bash launch/install.sh [EXTRA,...]
# Needs Python >= 3.11 with venv, or uv. Done before and nothing changed: returns at once.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."

[ $# -le 1 ] || { echo "usage: bash launch/install.sh [EXTRA,...], such as ${1},$2" >&2; exit 2; }
extras=${1:-}
for extra in ${extras//,/ }; do
  grep -q "^$extra = \[" pyproject.toml || { echo "there is no extra $extra: see pyproject.toml" >&2; exit 2; }
done
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  extras=${extras:+$extras,}cuda
elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null || [ -n "${TPU_NAME:-}" ]; then
  extras=${extras:+$extras,}tpu
fi
target=".${extras:+[$extras]}"

stamp=.venv/.installed
versions=$(cat pyproject.toml launch/constraints.txt | cksum)
want="$target $versions"
if [ -f "$stamp" ] && grep -qxF "$want" "$stamp"; then exit 0; fi

echo "installing jaxlm${extras:+[$extras]} into .venv (a minute or a few, as the network is)"
if command -v uv >/dev/null; then
  [ -x .venv/bin/python ] || uv venv --quiet --python '>=3.11' .venv
  uv pip install --quiet --python .venv/bin/python -c launch/constraints.txt -e "$target"
else
  if ! [ -x .venv/bin/python ]; then
    for python in python3 python3.13 python3.12 python3.11 ''; do
      if [ -z "$python" ]; then
        echo "jaxlm needs Python 3.11 or later, or uv; python3 here is $(python3 --version 2>&1)" >&2
        exit 1
      fi
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    "$python" -m venv .venv
  fi
  .venv/bin/python -m ensurepip >/dev/null 2>&1 || true # uv makes environments without pip
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e "$target"
fi
{ grep -F " $versions" "$stamp" 2>/dev/null || true; echo "$want"; } >"$stamp.new"
mv "$stamp.new" "$stamp"
