#!/usr/bin/env bash
# Raw data -> one set of tar shards, by a job array: each task makes an exact part, and the last one joins them.
#   sbatch --array=0-7 slurm/shards.sh OUT --llava raw.json --images raw/images
#   sbatch --array=0-7 slurm/shards.sh OUT 'raw/part-*.json' --llava {} --images raw/images
# The first form cuts the records of one table into as many parts as there are tasks. In the second {} is the task's own
# table: the first file that the pattern names for task 0, and so on. The other arguments are those of
# `sightline shards make`. Parts lie in OUT/part-0000, ... until all are there; then OUT is one set with one index. The
# same command makes what is missing; an interrupted part goes on with its finished tars. At most 4 at once: --array=0-7%4
#SBATCH --job-name=sightline-shards
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# %A is the array's number, %a the task's.
#SBATCH --output=slurm/logs/%x-%A_%a.out
set -euo pipefail

out=$1
shift
number=${SLURM_ARRAY_TASK_ID:-0} count=${SLURM_ARRAY_TASK_COUNT:-0}
if [ "$((${SLURM_ARRAY_TASK_MAX:-$((count - 1))} + 1))" -ne "$count" ]; then
    echo "error: an array of all tasks from 0 on is needed: sbatch --array=0-7 slurm/shards.sh ..." >&2
    exit 2
fi
run=(bash slurm/launch.sh run python -m tools.shards)
if [ "${1#--}" != "$1" ]; then
    exec "${run[@]}" make "$out" "$@" --part "$number/$count" --jobs "${SLURM_CPUS_PER_TASK:-1}" --quiet
fi
pattern=$1
shift
mapfile -t tables < <(compgen -G "$pattern" | sort)
if [ "${#tables[@]}" -ne "$count" ]; then
    echo "error: '$pattern' names ${#tables[@]} files: sbatch --array=0-$((${#tables[@]} - 1)) slurm/shards.sh ..." >&2
    exit 2
fi
table=${tables[$number]}
exec "${run[@]}" make "$out" "${@//\{\}/$table}" --part "$number/$count" --whole --jobs "${SLURM_CPUS_PER_TASK:-1}" --quiet
