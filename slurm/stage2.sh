#!/usr/bin/env bash
# Stage 2, lora: the language model learns too.
#   sbatch slurm/stage2.sh [RECIPE] [key=value ...]      (from the repository's root; more nodes: sbatch --nodes=4 ...)
#SBATCH --job-name=sightline-lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm/%x-%j.out
#SBATCH --open-mode=append
# --mem=0 takes all memory of the node; append keeps what a requeued job wrote before.
set -euo pipefail

recipe=${1:-recipes/llava15_tiny.yaml}
[ "$#" -gt 0 ] && shift
exec bash slurm/launch.sh lora "$recipe" "$@"
