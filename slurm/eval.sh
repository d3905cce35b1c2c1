#!/usr/bin/env bash
# Scores of a bundle, on all GPUs of the job's nodes: one worker each, of which the last one to finish scores.
#   sbatch slurm/eval.sh BUNDLE --suite SUITE.yaml --out SCORES.json      the arguments of `sightline eval`
#   sbatch --nodes=2 --gpus-per-node=8 slurm/eval.sh ...                  more GPUs; answers of earlier starts are kept
#SBATCH --job-name=sightline-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
# After preemption or the loss of the node it starts again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail

exec bash slurm/launch.sh workers python -m eval.run "$@"
