#!/usr/bin/env bash
# Raw data in parts -> tar shards, one task of a job array for each part.
#   sbatch --array=0-7 slurm/shards.sh OUT 'raw/part-*.json' --llava {} --images raw/images
# {} is the task's part: the first file that the pattern names for task 0, and so on; the other words are those of
# `sightline shards make`. Makes OUT/part-0000, ...; parts that are there already are left alone, so that the same
# command again makes what is missing. At most 4 at once: --array=0-7%4
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

out=$1 pattern=$2
shift 2
mapfile -t parts < <(compgen -G "$pattern" | sort)
if [ "${#parts[@]}" -ne "${SLURM_ARRAY_TASK_COUNT:-0}" ]; then
    echo "error: '$pattern' names ${#parts[@]} files: sbatch --array=0-$((${#parts[@]} - 1)) slurm/shards.sh ..." >&2
    exit 2
fi
made=$out/$(printf 'part-%04d' "$SLURM_ARRAY_TASK_ID")
if [ -d "$made" ]; then
    echo "$made: there already"
    exit 0
fi
mkdir -p "$out"
part=${parts[$SLURM_ARRAY_TASK_ID]}
exec bash slurm/launch.sh run python -m tools.shards make "$made" "${@//\{\}/$part}" --jobs "${SLURM_CPUS_PER_TASK:-1}" --quiet
