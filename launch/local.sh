#!/usr/bin/env bash
# One run of several processes on this machine, each with one GPU if there are any.
set -euo pipefail

usage() {
  echo "usage: launch/local.sh [--dry-run] PROCESSES --config=FILE --workdir=DIR [FLAG ...]" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
processes=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
environment=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes")

pids=()
signals=0
stop() {
  signals=$((signals + 1))
  kill "${pids[@]}" 2>/dev/null || true
}
trap stop INT TERM
for ((i = 0; i < processes && !signals; i++)); do
  command=(env "${environment[@]}" "JAX_PROCESS_ID=$i" "JAX_LOCAL_DEVICE_IDS=$i"
    "$python" -m dynprune_jax.main "$@")
  if [[ $dry_run ]]; then
    echo "${command[*]@Q}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
if ((signals)); then stop; fi # one may have been started meanwhile

status=0
for i in "${!pids[@]}"; do
  seen=-1
  while ((seen != signals)); do # a signal cuts a wait short, and the process may still be saving
    seen=$signals
    ended=0
    wait "${pids[i]}" || ended=$?
  done
  if ((ended)); then
    echo "launch/local.sh: process $i of $processes ended with status $ended" >&2
    status=$((status ? status : ended))
  fi
done
exit "$status"
