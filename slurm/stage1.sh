#!/usr/bin/env bash
# Stage 1, align: the projector learns alone.
#   sbatch slurm/stage1.sh [RECIPE] [--stage NAME] [key=value ...]    from the repository's root; sbatch --nodes=4 for more
#SBATCH --job-name=sightline-align
#SBATCH --nodes=1
# Every core of the nodes, and with --mem=0 all their memory.
#SBATCH --exclusive
#SBATCH --mem=0
# One rank on each.
#SBATCH --gpus-per-node=8
# Of one start. USR1 comes three minutes before its end, to every rank: save, then the job is queued again.
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
# Slurm may queue the job again after preemption or the loss of a node; its log goes on where it was.
#SBATCH --requeue
#SBATCH --open-mode=append
# The folder is part of the repository: Slurm fails a job in silence where it is missing.
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail

recipe=${1:-recipes/llava15_tiny.yaml}
[ "$#" -gt 0 ] && shift
exec bash slurm/launch.sh train align "$recipe" "$@"
