# shellcheck shell=bash
# The parts of tpu_pod.sh, which sources this file. In a dry run they print their commands.

say() { printf '%s  %s\n' "$(date +%T)" "$*" >&2; }
quote() { # WORDS, as a shell reads them back
  local word q="'\\''"
  for word; do
    case $word in *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s' " "${word//\'/$q}" ;; *) printf '%s ' "$word" ;; esac
  done
}
do_() { if [ -n "$DRY_RUN" ]; then quote "$@" && echo; else "$@"; fi; }
gc() { do_ gcloud compute tpus queued-resources "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet; }

runtime_version() { # of the accelerator; empty where it is not known
  case $ACCELERATOR_TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}
create() {
  local nodes="--node-id=$NAME" version=${RUNTIME_VERSION:-$(runtime_version)}
  [ "$NODE_COUNT" = 1 ] || nodes="--node-count=$NODE_COUNT --node-prefix=$NAME"
  # shellcheck disable=SC2086 # several flags
  gc create "$NAME" $nodes --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$version" \
    ${SPOT:+--spot} $CREATE_FLAGS && return
  say "creating $NAME failed. Should it be there all the same, to delete it: $(to_delete)"
  return 1
}

state() { # gone, unknown (gcloud failed), or Google's word, such as ACTIVE
  local said
  if said=$(gc describe "$NAME" --format='value(state.state)' 2>&1); then
    grep -xE '[A-Z_]+' <<<"$said" || echo unknown
  elif [[ $said == *NOT_FOUND* ]]; then
    echo gone
  else
    say "$said"
    echo unknown
  fi
}

to_delete() { echo "bash launch/tpu_pod.sh delete --name=$NAME --zone=$ZONE${PROJECT:+ --project=$PROJECT}"; }

delete() { # fails, and says so, where it has not seen that it is gone
  local try state=unknown
  [ -z "$DRY_RUN" ] || { gc delete "$NAME" --force --async && gc describe "$NAME" && return; }
  for ((try = 1; try <= TRIES; try++)); do
    state=$(state)
    [ "$state" != gone ] || { say "$NAME is not, or no longer, in $ZONE" && return; }
    [ "$state" = DELETING ] || gc delete "$NAME" --force --async || say "try $try of $TRIES failed; again in $POLL s"
    sleep "$POLL"
  done
  say "NOT DELETED, as far as is known: $NAME in $ZONE ($state). It may run, and cost, on. Again: $(to_delete)"
  return 1
}

reach() { # ssh or scp to every worker, not waiting for ever for one that is lost
  # shellcheck disable=SC2086 # several flags
  gc "$@" --node=all --worker=all "--$1-flag=-oConnectTimeout=20" "--$1-flag=-oServerAliveInterval=20" $SSH_FLAGS
}

on() { # COMMAND on every worker. gcloud is content where it cannot reach a slice, so each has to say that it is done
  reach ssh "$NAME" --command="$1" | awk -v slices="$NODE_COUNT" '
    /^done: / {sub(/-w-[0-9]+$/, ""); n += !seen[$2]++; next} {print} END {exit (n < slices)}' || [ -n "$DRY_RUN" ]
}

copy() { # the code that is here
  local tgz=${TMPDIR:-/tmp}/jaxlm-$NAME.tgz
  do_ tar -czf "$tgz" --exclude=__pycache__ pyproject.toml README.md LICENSE jaxlm configs launch &&
    reach scp "$tgz" "$NAME:jaxlm.tgz" &&
    on "mkdir -p jaxlm && tar -xzf jaxlm.tgz -C jaxlm && rm jaxlm.tgz && echo done: \$(hostname)"
}
install() { on "${SETUP:+($SETUP) && }bash jaxlm/launch/tpu_worker.sh install"; }
start() { on "bash jaxlm/launch/tpu_worker.sh start $(quote "$@")"; }
look() { on "bash jaxlm/launch/tpu_worker.sh look"; }
logs() { gc ssh "$NAME" --node=0 --worker=0 --command="tail -n 100 -F jaxlm/train.log"; }
status() { gc describe "$NAME" && look; }
