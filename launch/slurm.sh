#!/usr/bin/env bash
# One run as a Slurm job, one process for each task. After a requeue it goes on where it stood:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-task=1 launch/slurm.sh --config=FILE --workdir=DIR
# The workdir must be on a file system that all nodes share.
#SBATCH --job-name=dynprune_jax
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

usage() {
  echo "usage: sbatch [OPTION ...] launch/slurm.sh [--dry-run] --config=FILE --workdir=DIR [FLAG ...]" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
[[ $# -ge 2 && $1 == --* ]] || usage
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "launch/slurm.sh: this is no Slurm job; start it with sbatch" >&2
  exit 2
fi
# Where each task has GPUs of its own it sees no others; JAX would ask for the one of its number.
if [[ ${SLURM_GPUS_PER_TASK:-} && ! ${JAX_LOCAL_DEVICE_IDS:-} ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_PER_TASK##*:} - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# This script runs on the job's first node, where process 0 will be. The rest JAX asks of Slurm.
export JAX_COORDINATOR_ADDRESS=${SLURMD_NODENAME:-$(hostname)}:$((SLURM_JOB_ID % 4096 + 61440))
command=(srun --kill-on-bad-exit=1 --label "${PYTHON:-python}" -m dynprune_jax.main "$@")
if [[ $dry_run ]]; then
  echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" \
    ${JAX_LOCAL_DEVICE_IDS:+"JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS"} "${command[*]@Q}"
else
  exec "${command[@]}"
fi
