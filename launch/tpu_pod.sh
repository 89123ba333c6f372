#!/usr/bin/env bash
# One run on a Cloud TPU slice of any size, preemptible ones included.
#
#   RUN=NAME     the run's id: the slice's name, and the folder of the run in the share
#   ZONE=…       such as us-central2-b
#   TYPE=…       such as v5litepod-16
#   SHARE=…      an NFS export that outlives the slice, such as Filestore's 10.0.0.2:/runs
#   VERSION=…    the TPU's software, default tpu-ubuntu2204-base
#   PREEMPTIBLE=no    for a slice on demand
#   WAIT=…       seconds until a slice is asked for again, default 60
#
# all: create, install, run, delete, with a new slice after each preemption. It has to stay: start
# it in tmux or on a small machine. The other words are its parts; log follows worker 0.
set -euo pipefail

usage() {
  echo "usage: RUN= ZONE= TYPE= SHARE= launch/tpu_pod.sh [--dry-run]" \
    "all|create|install|run|log|delete [--config=FILE FLAG ...]" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 1 && ${RUN:-} && ${ZONE:-} && ${TYPE:-} && ${SHARE:-} ]] || usage
verb=$1
shift
[[ $verb != all && $verb != run || ${1:-} == --config=* ]] || usage

root=$(dirname "$0")/..
if [[ ($verb == all || $verb == install) && ! -e $root/.git ]]; then
  echo "launch/tpu_pod.sh: $root is no git checkout, whose commit the slice would get: clone one" >&2
  exit 2
fi

exec 3>&1 # what a dry run prints, also where the output of a command is read

tpu() { # VERB ARGUMENT ...: gcloud's own verbs
  local command=(gcloud compute tpus tpu-vm "$@" "--zone=$ZONE")
  if [[ $dry_run ]]; then
    echo "${command[*]@Q}" >&3
  else
    "${command[@]}"
  fi
}

on_workers() { # WHICH COMMAND
  tpu ssh "$RUN" "--worker=$1" "--command=$2"
}

create() {
  local slice=("--accelerator-type=$TYPE" "--version=${VERSION:-tpu-ubuntu2204-base}")
  [[ ${PREEMPTIBLE:-yes} == no ]] || slice+=(--preemptible)
  tpu create "$RUN" "${slice[@]}"
}

install() {
  local code=/tmp/$RUN.tar.gz
  [[ $dry_run ]] || git -C "$root" archive --format=tar.gz --output="$code" HEAD || return
  tpu scp "$code" "$RUN:code.tar.gz" --worker=all &&
    on_workers all "set -e
mkdir -p ~/dynprune_jax ~/runs
sudo apt-get install -qq nfs-common
mountpoint -q ~/runs || sudo mount -t nfs -o lookupcache=positive $SHARE ~/runs
tar xzf ~/code.tar.gz -C ~/dynprune_jax
pip install -q uv
~/.local/bin/uv venv -q --clear --python=3.12 ~/venv
~/.local/bin/uv pip install -q --python=\$HOME/venv 'jax[tpu]' ~/dynprune_jax"
}

run() { # [FLAG ...]
  local first
  first=$(tpu describe "$RUN" '--format=value(networkEndpoints[0].ipAddress)') || return
  [[ ! $dry_run ]] || first=ADDRESS
  # How many workers there are, and which is which, JAX asks of the slice.
  on_workers all "set -o pipefail; cd ~/dynprune_jax
JAX_COORDINATOR_ADDRESS=$first:8476 ~/venv/bin/python -m dynprune_jax.main \
--workdir=\$HOME/runs/$RUN ${*@Q} 2>&1 | tee -a ~/$RUN.log"
}

log() { on_workers 0 "tail -n 100 -F ~/$RUN.log"; }
delete() { tpu delete "$RUN" --quiet; }

all() { # [FLAG ...]
  local had=
  until create && had=1 && install && run "$@"; do
    case $(tpu describe "$RUN" '--format=value(state)' || true) in
      READY)
        echo "launch/tpu_pod.sh: it failed on a slice that is in order, which is left for you" >&2
        exit 1
        ;;
      "") # no slice
        [[ $had ]] || exit 1 # the first: gcloud has said why
        echo "launch/tpu_pod.sh: there is no slice to be had; it is asked for again" >&2
        sleep "${WAIT:-60}"
        ;;
      *)
        echo "launch/tpu_pod.sh: $RUN was preempted; it goes on on a new slice" >&2
        delete
        ;;
    esac
  done
  delete
}

case $verb in
  all | run) "$verb" "$@" ;;
  create | install | log | delete) "$verb" ;;
  *) usage ;;
esac
