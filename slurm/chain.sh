#!/usr/bin/env bash
# A whole run from the login node: every stage of a recipe, a bundle, its scores. Prints the jobs' numbers.
#   slurm/chain.sh [--nodes N] [--to nf4|int8] [--suite SUITE.yaml] [RECIPE] [key=value ...]
# Preflight runs first, so that its findings come before anything is queued. Each job waits for the previous one; if one
# fails permanently, the later ones are removed from the queue. --suite: what `sightline eval` measures, else no scores.
set -Eeuo pipefail
cd "$(dirname "$0")/.."

nodes=1 to=nf4 suite=''
while [ "$#" -gt 0 ]; do
    case $1 in
        --nodes) nodes=$2 && shift 2 ;;
        --to) to=$2 && shift 2 ;;
        --suite) suite=$2 && shift 2 ;;
        *) break ;;
    esac
done
recipe=${1:-recipes/llava15_tiny.yaml}
[ "$#" -gt 0 ] && shift

SIGHTLINE_WRAP=()
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then source slurm/site.env; fi
eval "${SIGHTLINE_SETUP:-}"
export PATH="${SIGHTLINE_VENV:-$PWD/.venv}/bin:$PATH"

"${SIGHTLINE_WRAP[@]}" python -m tools.preflight "$recipe" "$@" --gpus "$((nodes * ${SBATCH_GPUS_PER_NODE:-8}))" \
    --device "${SIGHTLINE_GPU:-H100}" --gpu-memory "${SIGHTLINE_GPU_MEMORY:-80GB}"
plan=$("${SIGHTLINE_WRAP[@]}" python -m tools.snapshot "$recipe" "$@" --plan)
{ read -r run && read -r stages; } <<< "$plan"

jobs=()
trap '[ "${#jobs[@]}" -eq 0 ] || scancel "${jobs[@]}"' ERR # an incomplete chain must not run
submit() { # NAME, then sbatch's arguments
    local name=$1 after=()
    if [ "${#jobs[@]}" -gt 0 ]; then after=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes); fi
    job=$(sbatch --parsable --job-name="sightline-$name" "${after[@]}" "${@:2}")
    jobs+=("${job%%;*}") # sbatch prints JOB;CLUSTER where there are several clusters
    echo "$name ${jobs[-1]}"
}

script=slurm/stage1.sh
for stage in $stages; do
    submit "$stage" --nodes="$nodes" "$script" "$recipe" --stage "$stage" "$@"
    script=slurm/stage2.sh
done
submit bundle --gpus-per-node=1 slurm/bundle.sh "$run" "$run/bundle" --to "$to"
if [ -n "$suite" ]; then
    submit eval --gpus-per-node=1 slurm/eval.sh "$run/bundle" --suite "$suite" --out "$run/eval/bundle.json"
fi
