#!/usr/bin/env bash
# The one launcher of all job scripts. Each function is a phase; `train` says in which order they come.
#   launch.sh train STAGE RECIPE [--stage OTHER] [key=value ...]   a stage, over restarts, to its end
#   launch.sh run COMMAND ...                                      one process on the job's first node
#   launch.sh task COMMAND ...                                     one rank: what srun starts
# A job works from RUN/jobs/JOB, a copy of code and recipe made at its first start: editing disturbs no queued job.
set -Eeuo pipefail
trap 'echo "$0: line $LINENO ended with $?" >&2' ERR

here=$(cd "$(dirname "$0")" && pwd)
restart=${SLURM_RESTART_COUNT:-0}

read_site() {
    SIGHTLINE_SRUN=() SIGHTLINE_WRAP=()
    # shellcheck source=/dev/null
    if [ -f slurm/site.env ]; then source slurm/site.env; fi
    eval "${SIGHTLINE_SETUP:-}"
    export PATH="${SIGHTLINE_VENV:-$PWD/.venv}/bin:$PATH"
}

run() {
    srun --nodes=1 --ntasks=1 "${SIGHTLINE_SRUN[@]}" "${SIGHTLINE_WRAP[@]}" "$@"
}

say() { echo "job $SLURM_JOB_ID, restart $restart, $(date +%FT%T): $*" || true; } # a full disk costs a line

stop() { # REASON CODE: nothing that depends on this job will start
    say "stopped: $1"
    exit "$2"
}

read_words() {
    stage=$1 recipe=$2 overrides=()
    shift 2
    while [ "$#" -gt 0 ]; do
        if [ "$1" = --stage ]; then stage=$2 && shift 2; else overrides+=("$1") && shift; fi
    done
}

# Go on as the copy's launcher; made at the first start, found by the job's number at the others.
enter_copy() {
    local link=slurm/logs/job-$SLURM_JOB_ID copy
    if [ "$restart" = 0 ] || [ ! -e "$link" ]; then
        copy=$(run python -m tools.snapshot "$recipe" --stage "$stage" --job "$SLURM_JOB_ID" "${overrides[@]}" |
            tail -n 1) || stop "this recipe cannot be started, see above" 2
        ln -sfn "$copy" "$link"
    fi
    exec bash "$(readlink "$link")/slurm/launch.sh" train "$stage" "$recipe" "${overrides[@]}"
}

# Finished means finished; a run that gets nowhere ends here.
look_back() {
    if [ -f "$directory/finished.json" ]; then
        say "finished already: $directory"
        exit 0
    fi
    local newest idle
    mkdir -p "$directory/checkpoints" "$directory/logs" "$job/ended/$restart"
    touch "$job/starts"
    newest=$(find "$directory/checkpoints" -maxdepth 1 -name 'step_*' -printf '%f\n' | sort | tail -n 1)
    newest=${newest:-nothing}
    idle=$(awk -v now="$newest" '{ n = $2 == now ? n + 1 : 0 } END { print n + 0 }' "$job/starts")
    if [ "$idle" -gt "${SIGHTLINE_MAX_IDLE:-3}" ]; then
        stop "$idle starts in a row came no further than $newest; see $directory/logs" 1
    fi
    echo "$restart $newest $SLURM_JOB_NODELIST" >> "$job/starts"
    say "goes on from $newest on $SLURM_JOB_NODELIST"
}

# What the ranks find in their environment.
set_environment() {
    local end
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # head would end before scontrol has
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 20000)) # the last start's may not be free yet
    export MASTER_ADDR MASTER_PORT
    end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)
    if end=$(date -d "$end" +%s 2>/dev/null); then export SIGHTLINE_END_TIME="$end"; fi
    # A build that was killed leaves a lock on which the next one hangs for ever: a cache for each start.
    export SIGHTLINE_BUILDS="${SIGHTLINE_CACHE:-/tmp}/sightline-$SLURM_JOB_ID-$restart"
    export TORCH_EXTENSIONS_DIR="$SIGHTLINE_BUILDS/torch" TRITON_CACHE_DIR="$SIGHTLINE_BUILDS/triton"
    if [ -n "${SIGHTLINE_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME="$SIGHTLINE_INTERFACE" GLOO_SOCKET_IFNAME="$SIGHTLINE_INTERFACE"
    fi
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
}

# One task a GPU, or one deepspeed a node. Each rank's output is appended to DIRECTORY/logs/rank_00000.log and so on.
start_ranks() {
    local gpus=${SLURM_GPUS_ON_NODE:-1} tasks words
    words=("$job/trainer/main.py" "$job/recipe.yaml" --stage "$stage" "${overrides[@]}")
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE / gpus))}"
    if [ "${SIGHTLINE_LAUNCHER:-srun}" = deepspeed ]; then
        tasks=1
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$gpus/" > "$job/hostfile"
        # shellcheck disable=SC2016  # only the node knows its number
        words=(bash -c 'exec deepspeed --node_rank="$SLURM_NODEID" "$@"' deepspeed --hostfile="$job/hostfile" --no_ssh
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "${words[@]}")
    else
        tasks=$gpus
        words=(python "${words[@]}")
    fi
    # --wait: a minute after one rank has ended the others are, should they not have noticed.
    # --cpus-per-task: srun does not take it over from the job.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" --cpus-per-task="$((SLURM_CPUS_ON_NODE / tasks))" \
        --wait=60 --open-mode=append --output="$directory/logs/rank_%5t.log" "${SIGHTLINE_SRUN[@]}" \
        bash "$here/launch.sh" task "${SIGHTLINE_WRAP[@]}" "${words[@]}"
}

# A rank. It notes how it ended; a node that is dead or cut off notes nothing.
task() {
    local code=0
    trap '' USR1 # handed down: a rank takes the signal over, and nothing else in the step is to die of it
    trap : TERM
    echo "--- job $SLURM_JOB_ID, restart $restart, rank $SLURM_PROCID on $SLURMD_NODENAME, $(date +%FT%T)" || true
    "$@" || code=$?
    echo "$code" >> "$here/../ended/$restart/$SLURMD_NODENAME" || true
    if [ "$SLURM_LOCALID" = 0 ]; then rm -rf "${SIGHTLINE_BUILDS:?}" || true; fi
    exit "$code"
}

train() {
    read_words "$@"
    if [ ! -f "$here/../job.json" ]; then enter_copy; fi
    job=$(cd "$here/.." && pwd)
    directory=$(cd "$job/../.." && pwd)/$stage
    # shellcheck source=slurm/requeue.sh
    source "$here/requeue.sh"
    look_back
    set_environment
    trap - ERR
    local code=0
    trap : TERM # the ranks are told as well; this shell waits for them
    start_ranks || code=$?
    if [ "$code" = 0 ] && [ -f "$directory/finished.json" ]; then
        say "finished: $directory"
        exit 0
    fi
    requeue_or_stop "$code"
}

verb=$1
shift
case $verb in
    train) read_site && train "$@" ;;
    run) read_site && run "$@" ;;
    task) task "$@" ;;
    *) echo "launch.sh $verb: train, run or task was expected" >&2 && exit 2 ;;
esac
