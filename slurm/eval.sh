#!/usr/bin/env bash
# Scores of a bundle, on one GPU.
#   sbatch slurm/eval.sh BUNDLE --suite SUITE.yaml --out SCORES.json      the words of `sightline eval`
#SBATCH --job-name=sightline-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
# After preemption or the loss of the node it begins again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail

exec bash slurm/launch.sh run python -m eval.run "$@"
