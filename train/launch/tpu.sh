#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one process per host, from nothing to the removed slice.
#   export NAME=sdjax ZONE=us-west4-a TYPE=v5litepod-16 SHARE=10.0.0.2:/share
#   train/launch/tpu.sh up                                               make it, copy this commit, install
#   train/launch/tpu.sh run make train-encoder ARGS="parallel=mesh"      start a command on all hosts
#   train/launch/tpu.sh down                                             remove it
# SHARE: an NFS export (Filestore) that all hosts mount as outputs/.  VERSION: the image of TYPE.
set -euo pipefail
: "${NAME:?a name for the slice}" "${ZONE:?a zone, such as us-west4-a}"
tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
on_all() { tpu ssh --worker=all --command="$1"; }

case "${1:-}" in
up)
    : "${TYPE:?the kind of slice, such as v5litepod-16}" "${SHARE:?an NFS export, HOST:/PATH}"
    tpu create --accelerator-type="$TYPE" --version="${VERSION:-v2-alpha-tpuv5-lite}"
    packed=$(mktemp -d)
    trap 'rm -r "$packed"' EXIT
    git archive --prefix=sdjax/ -o "$packed/sdjax.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$packed/sdjax.tar.gz" "$NAME:" --zone="$ZONE" --quiet --worker=all
    on_all "tar xf sdjax.tar.gz && mkdir -p sdjax/outputs && sudo apt-get install -y -qq nfs-common make &&
        sudo mount $SHARE sdjax/outputs && python3 -m pip install --quiet --user uv &&
        ~/.local/bin/uv python install 3.12 &&
        make -C sdjax install ACCEL=tpu PYTHON=\$(~/.local/bin/uv python find 3.12)"
    ;;
run)
    (($# > 1)) || { echo "usage: train/launch/tpu.sh run COMMAND ..." >&2; exit 2; }
    on_all "cd sdjax && ACCEL=tpu$(printf ' %q' "${@:2}")"
    ;;
down) tpu delete ;;
*) echo "usage: train/launch/tpu.sh up | run COMMAND ... | down" >&2; exit 2 ;;
esac
