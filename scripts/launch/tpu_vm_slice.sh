#!/usr/bin/env bash
# Runs jalign on every host of a Cloud TPU slice. See docs/multihost.md.
#
#   TPU_NAME=my-slice ZONE=us-central2-b scripts/launch/tpu_vm_slice.sh install
#   TPU_NAME=my-slice ZONE=us-central2-b scripts/launch/tpu_vm_slice.sh run \
#       sft --model gs-or-hub-id --data rows.jsonl --out /mnt/share/run1 --mesh fsdp=-1
#   ... status | stop
#
# Settings (environment):
#   TPU_NAME, ZONE   the slice (required).   PROJECT   unset: gcloud's default.
#   SOURCE           what pip installs; default "jalign[tpu]", or a git or wheel URL.
#   VENV             virtual environment on the hosts; default ~/jalign-venv.
#   MAX_RESTARTS     after a process was stuck or has died; default 10.
#   PRINT_ONLY=1     print the gcloud command instead of running it.
set -euo pipefail

usage() {
  sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
}

: "${TPU_NAME:?set TPU_NAME to the name of the slice}"
: "${ZONE:?set ZONE to the zone of the slice}"
VENV="${VENV:-\$HOME/jalign-venv}"
SOURCE="${SOURCE:-jalign[tpu]}"
LOG='$HOME/jalign.log'

on_all_hosts() {
  local command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE"
    ${PROJECT:+--project "$PROJECT"} --worker=all --command "$1")
  if [[ "${PRINT_ONLY:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

[[ $# -ge 1 ]] || usage
action="$1"
shift
case "$action" in
  install)
    on_all_hosts "python3 -m venv $VENV && $VENV/bin/pip install -U pip $(printf '%q' "$SOURCE")"
    ;;
  run)
    [[ $# -ge 1 ]] || usage
    # The same command on every host: jalign finds the other hosts by itself. Without
    # SIGHUP, so that the run outlives this terminal; only host 0 prints progress. 76 is
    # a stuck process, 134 and 137 a dead one, or its peer: each host starts again, and
    # all meet at the last checkpoint.
    words="$(printf '%q ' "$@")"
    on_all_hosts "( trap '' HUP; for n in \$(seq 0 ${MAX_RESTARTS:-10}); do $VENV/bin/jalign $words; code=\$?; case \$code in 76 | 134 | 137) sleep 5 ;; *) exit \$code ;; esac; done; exit \$code ) > $LOG 2>&1 < /dev/null & echo \$! > \$HOME/jalign.pid"
    ;;
  status)
    on_all_hosts "tail -n 3 $LOG; kill -0 \$(cat \$HOME/jalign.pid) 2>/dev/null && echo running || echo ended"
    ;;
  stop)
    # SIGTERM: all hosts save a checkpoint of the same step; `run` again continues.
    on_all_hosts "pkill -TERM -P \$(cat \$HOME/jalign.pid)"
    ;;
  *)
    usage
    ;;
esac
