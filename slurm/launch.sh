#!/usr/bin/env bash
# Shared by the job scripts: one srun task per GPU, each a rank of one training run.
#   launch.sh STAGE RECIPE [key=value ...]
set -euo pipefail

stage=$1
recipe=$2
shift 2
if [ -f slurm/site.env ]; then
    # shellcheck source=/dev/null
    source slurm/site.env
fi
eval "${SIGHTLINE_SETUP:-}"
export PATH="${SIGHTLINE_VENV:-$PWD/.venv}/bin:$PATH"

# The first node of the job is where the ranks meet; the port follows from the job's number, so that jobs do not collide.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# A private build cache for each job: a stale lock in a shared one hangs every later start.
export TORCH_EXTENSIONS_DIR="${TMPDIR:-/tmp}/torch_extensions_$SLURM_JOB_ID"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

srun --kill-on-bad-exit=1 python -m trainer.main "$recipe" --stage "$stage" "$@"
