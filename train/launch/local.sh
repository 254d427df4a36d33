#!/usr/bin/env bash
# Starts a command as N processes of this machine, which JAX joins; ends with the first status that is not 0.
#   train/launch/local.sh 2 .venv/bin/python train/run.py CONFIG parallel=mesh
set -u
case "${1:-}" in '' | *[!0-9]*) echo "usage: train/launch/local.sh N COMMAND ..." >&2; exit 2 ;; esac
number=$1
shift
export JAX_NUM_PROCESSES=$number JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:8476}
started=()
trap 'kill -TERM $(jobs -p) 2>/dev/null' TERM # the one that just started is in no array yet
for ((i = 0; i < number; i++)); do
    JAX_PROCESS_ID=$i "$@" &
    started+=($!)
done
status=0
for pid in "${started[@]}"; do
    while :; do
        wait "$pid"
        ended=$?
        kill -0 "$pid" 2>/dev/null || break # a signal to this script ends `wait` too early
    done
    ((status != 0)) || status=$ended
done
exit "$status"
