#!/usr/bin/env bash
# Trains on a Cloud TPU pod, one slice or several, as a queued resource. Needs gcloud, logged in.
# Usage: bash launch/tpu_pod.sh COMMAND --name=N --zone=Z --accelerator_type=v5p-128 [FLAGS] [-- TRAIN_FLAGS]
#   run: creates it, waits until it is ACTIVE, copies, installs, starts and watches. Preempted, it is deleted, created
#     again, and the same command resumes. Ends with training's exit code and deletes the machine (--keep: leaves it).
#     The same `run` again, after Ctrl-C or a lost connection, watches the training that is there.
#   create copy install start logs status delete: its parts. `delete` ends with 0 only once it has seen it gone.
# FLAGS: --project --runtime_version (default: the accelerator's) --spot --node_count=SLICES --keep --dry_run
#   --setup=COMMAND on every worker before training, such as mounting what holds the data and the workdir
#   --create_flags --ssh_flags: more for gcloud; --poll=SECONDS between looks (30); --tries: then it gives up (40)
#   Each is also an environment variable, in capitals.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '1d;/^# /!q;s/^# //p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
source launch/tpu_parts.sh
usage() { { sed -n '2,11s/^# //p' launch/tpu_pod.sh && printf '\nerror: %s\n' "$1"; } >&2 && exit 2; }

run() { # TRAIN_FLAGS. Looks what there is, and does what comes next, until training has ended
  local now last='' ours='' begun='' said ends code='' failures=0 restarts=0
  if [ -n "$DRY_RUN" ]; then
    create; gc describe "$NAME"; copy; install; start "$@"; look; [ -n "$KEEP" ] || delete; return
  fi
  while [ -z "$code" ]; do
    now=$(state)
    [ "$now" = "$last" ] || say "$NAME: $now"
    last=$now
    case $now$begun in
      gone*)
        [ -z "$ours" ] || { say "$NAME has been deleted by someone else: it is not created again" && exit 1; }
        if create; then failures=0; else failures=$((failures + 1)); fi ;;
      SUSPEND* | FAILED*)
        if [ "$now" = FAILED ]; then restarts=$((restarts + 1)); gc describe "$NAME" >&2 || true; fi # with a reason
        delete || exit 1
        now=gone begun='' ;;
      ACTIVE) # the look: an earlier run may have started it
        if said=$(look 2>/dev/null) && ! grep -q '^ended: [^n]' <<<"$said"; then begun=+
        elif copy && install && start "$@"; then begun=+ failures=0
        else failures=$((failures + 1)); fi ;;
      ACTIVE+)
        said=$(look) || say "not every worker answers"
        grep '^step' <<<"$said" >&2 || true
        ends=$(sed -n 's/^ended: //p' <<<"$said" | sort -u)
        if [ "$ends" = 0 ]; then code=0
        elif [ -n "$ends" ] && ! grep -qx not <<<"$ends"; then # on all workers
          code=$(grep -vxE '0|75|134|lost' <<<"$ends" | head -n 1 || true)
          [ -n "$code" ] || { say "ended ($(xargs <<<"$ends")): again" && begun='' restarts=$((restarts + 1)); }
        fi ;;
    esac
    case $now in gone) ours='' ;; unknown) ;; *) ours=1 ;; esac
    ((failures < TRIES && restarts < TRIES)) || code=1
    [ -n "$code" ] || sleep "$POLL"
  done
  [ "$code" = 0 ] || [ "$now" != ACTIVE ] || on "tail -n 50 jaxlm/train.log; echo done: \$(hostname)" || true
  say "ended with exit code $code"
  if [ -n "$KEEP" ]; then say "$NAME is left, and costs. To delete it: $(to_delete)" && exit "$code"; fi
  delete || code=$((code ? code : 1))
  exit "$code"
}

known=" NAME ZONE PROJECT ACCELERATOR_TYPE RUNTIME_VERSION SPOT NODE_COUNT SETUP CREATE_FLAGS SSH_FLAGS POLL TRIES KEEP DRY_RUN "
for flag in $known; do printf -v "$flag" %s "${!flag:-}"; done
command=${1:-}; shift || true
while [ "${1:---}" != -- ]; do
  flag=$(tr '[:lower:]' '[:upper:]' <<<"${1%%=*}")
  [[ $flag == --* && $known == *" ${flag#--} "* ]] || usage "there is no flag $1"
  if [[ $1 == *=* ]]; then printf -v "${flag#--}" %s "${1#*=}"; else printf -v "${flag#--}" 1; fi
  shift
done
shift || true
for flag in SPOT KEEP DRY_RUN; do [ "${!flag}" != 0 ] || printf -v "$flag" ''; done
: "${NODE_COUNT:=1}" "${POLL:=30}" "${TRIES:=40}"
[[ $command =~ ^(run|create|copy|install|start|logs|status|delete)$ ]] || usage "there is no command '$command'"
[[ -n $NAME && -n $ZONE ]] || usage "give --name and --zone"
[[ ! $command =~ ^(create|run)$ || -n $RUNTIME_VERSION || -n $(runtime_version) ]] ||
  usage "give --accelerator_type, and --runtime_version where that is not v5litepod-N, v5p-N or v6e-N"
[[ ! $command =~ ^(start|run)$ || $# -gt 0 ]] || usage "give the flags of jaxlm.train after --"
trap 'say "interrupted; $NAME is left as it is, and costs. To delete it: $(to_delete)"; exit 130' INT TERM
"$command" "$@"
