#!/bin/bash
# Trains on a Cloud TPU VM, or on all hosts of a pod slice, until it is done.
#
#   PROJECT=my-project ZONE=us-central2-b scripts/tpu_vm.sh my-tpu v4-32 \
#     --config=configs/cub.py --workdir=gs://my-bucket/runs/cub \
#     --config.dataset.data_dir=gs://my-bucket/tfds --config.batch_size=256
#
# What follows the name and the type is handed on to main.py, the same on every
# host. SPOT=1 takes a preemptible slice: when it goes, it is made anew and the
# same command resumes from the last checkpoint. The slice is left standing at
# the end, and costs money until it is deleted:
#
#   gcloud compute tpus tpu-vm delete my-tpu --project=... --zone=...

set -uo pipefail

if [[ $# -lt 3 ]]; then
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE to a zone that has this type of TPU}"
name=$1 type=$2
shift 2
version=${VERSION:-tpu-ubuntu2204-base}
where=(--project="$PROJECT" --zone="$ZONE")

state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
    --format='value(state)' 2>/dev/null
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command="$1"
}

# Makes the slice and installs the project on each of its hosts.
create() {
  if [[ -n $(state) ]]; then
    # What is left of a preempted slice keeps its name taken.
    gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
  gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
    --accelerator-type="$type" --version="$version" ${SPOT:+--spot} || return
  # Only what git tracks: no runs, no virtual environment.
  git archive --prefix=cmd_jax/ --output=/tmp/cmd_jax.tar HEAD &&
    gcloud compute tpus tpu-vm scp /tmp/cmd_jax.tar "$name": "${where[@]}" \
      --worker=all &&
    on_all_hosts 'set -e
      tar xf cmd_jax.tar
      cd cmd_jax
      sudo apt-get install -y -q python3.11-venv
      python3.11 -m venv .venv
      .venv/bin/pip install -q -c constraints.txt -e ".[tpu]" gcsfs'
}

# The arguments, quoted once more for the shell of the hosts.
arguments=$(printf ' %q' "$@")

while true; do
  if [[ $(state) != READY ]]; then
    create || { sleep 60; continue; }
  fi
  on_all_hosts "cd cmd_jax && .venv/bin/python main.py$arguments"
  code=$?
  # 2 is a mistake that waiting does not mend.
  if [[ $code -eq 0 || $code -eq 2 ]]; then
    exit "$code"
  fi
  echo "ended with code $code; going on in a minute" >&2
  sleep 60
done
