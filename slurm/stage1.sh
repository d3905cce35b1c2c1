#!/usr/bin/env bash
# Stage 1, align: only the projector is trained.
#   sbatch slurm/stage1.sh [RECIPE] [--stage NAME] [key=value ...]    from the repository's root; sbatch --nodes=4 for more
#SBATCH --job-name=sightline-align
#SBATCH --nodes=1
# Every core of the nodes, and with --mem=0 all their memory.
#SBATCH --exclusive
#SBATCH --mem=0
# One rank per GPU.
#SBATCH --gpus-per-node=8
# Time limit of one start. USR1 goes to every rank three minutes before its end: save, then the job is requeued.
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
# Slurm may requeue the job after preemption or the loss of a node; its log is appended to.
#SBATCH --requeue
#SBATCH --open-mode=append
# The folder is part of the repository: without it Slurm fails the job without a message.
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail

recipe=${1:-recipes/llava15_tiny.yaml}
[ "$#" -gt 0 ] && shift
exec bash slurm/launch.sh train align "$recipe" "$@"
