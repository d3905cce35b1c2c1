#!/usr/bin/env bash
# A finished stage -> a small bundle, compared with the trained model, on one GPU.
#   sbatch slurm/bundle.sh RUN OUT [--to nf4|int8] [--stage NAME]      the arguments of `sightline bundle`
#SBATCH --job-name=sightline-bundle
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
# Room for the base in 16 bit twice: as trained, and merged.
#SBATCH --mem=64G
#SBATCH --time=04:00:00
# After preemption or the loss of the node it starts again; OUT is complete or absent.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
set -euo pipefail

exec bash slurm/launch.sh run python -m tools.bundle "$@"
