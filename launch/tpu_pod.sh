#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice, on all of its hosts:
#
#     bash launch/tpu_pod.sh NAME ZONE --config configs/causal_qformer.py --workdir DIR [--config.key=value ...]
#
# NAME is a running TPU VM (gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v4-64
# --version=tpu-ubuntu2204-base), to which this copies the repository and installs it. DIR and the
# data must be on a file system that all hosts have mounted (Filestore, or a bucket by gcsfuse). On
# GKE: launch/kubernetes.yaml.
#
# RESTARTS  how often to go on by itself when hosts were lost or stopped (default: 0)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 3 ] || { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
name=$1 zone=$2
shift 2

on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:seed_jax.tar.gz" --zone="$zone" --worker=all
jax=$(sed -n 's/^jax==/jax[tpu]==/p' requirements.txt)
on_all "mkdir -p seed_jax && tar -xzf seed_jax.tar.gz -C seed_jax && cd seed_jax && \
bash launch/setup.sh requirements.txt && .venv/bin/python -m pip install --quiet '$jax'"

# JAX asks the TPU's metadata who the other hosts are.
train="cd seed_jax && .venv/bin/python -m seed_jax.train --discover$(printf ' %q' "$@")"
for ((left = ${RESTARTS:-0}; ; left--)); do
    status=0
    on_all "$train" || status=$?
    if [ "$status" -le 2 ] || [ "$left" -le 0 ]; then
        exit "$status"
    fi
    echo "tpu_pod: ended with status $status; starting again ($((left - 1)) more times)" >&2
done
