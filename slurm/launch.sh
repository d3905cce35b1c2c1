#!/usr/bin/env bash
# The launcher of all job scripts. Each function is a phase; `train` calls them in order.
#   launch.sh train STAGE RECIPE [--stage OTHER] [key=value ...]   a stage, over restarts, to its end
#   launch.sh run COMMAND ...                                      one process on the job's first node
#   launch.sh workers COMMAND ...                                  one process for each GPU of the job's nodes
#   launch.sh task COMMAND ...                                     one rank: what srun starts
# A job works from RUN/jobs/JOB, a copy of code and recipe made at its first start: editing does not affect queued jobs.
set -Eeuo pipefail
trap 'echo "$0: line $LINENO ended with $?" >&2' ERR

here=$(cd "$(dirname "$0")" && pwd)
restart=${SLURM_RESTART_COUNT:-0}
# shellcheck source=slurm/exit_codes.sh
source "$here/exit_codes.sh"

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

# Each learns its number from srun. One that fails ends the others.
workers() {
    local gpus=${SLURM_GPUS_ON_NODE:-1}
    srun --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node="$gpus" \
        --cpus-per-task="$((${SLURM_CPUS_ON_NODE:-$gpus} / gpus))" --kill-on-bad-exit=1 \
        "${SIGHTLINE_SRUN[@]}" "${SIGHTLINE_WRAP[@]}" "$@"
}

say() { echo "job $SLURM_JOB_ID, restart $restart, $(date +%FT%T): $*" || true; } # on a full disk only this line is lost

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

# Continue as the copy's launcher; the copy is made at the first start, and found by the job's number at restarts.
enter_copy() {
    local link=slurm/logs/job-$SLURM_JOB_ID copy
    if [ "$restart" = 0 ] || [ ! -e "$link" ]; then
        copy=$(run python -m tools.snapshot "$recipe" --stage "$stage" --job "$SLURM_JOB_ID" "${overrides[@]}" |
            tail -n 1) || stop "this recipe cannot be started, see above" "$EXIT_INPUT_ERROR"
        ln -sfn "$copy" "$link"
    fi
    exec bash "$(readlink "$link")/slurm/launch.sh" train "$stage" "$recipe" "${overrides[@]}"
}

# A run without progress ends here. A finished one is started: it compares its recipe, and may be trained for longer.
look_back() {
    if [ -f "$directory/finished.json" ]; then say "finished already: $directory; its recipe is compared"; fi
    local newest idle
    mkdir -p "$directory/checkpoints" "$directory/logs" "$job/ended/$restart"
    touch "$job/starts"
    newest=$(find "$directory/checkpoints" -maxdepth 1 -name 'step_*' -printf '%f\n' | sort -V | tail -n 1)
    newest=${newest:-nothing}
    idle=$(awk -v now="$newest" '{ n = $2 == now ? n + 1 : 0 } END { print n + 0 }' "$job/starts")
    if [ "$idle" -gt "${SIGHTLINE_MAX_IDLE:-3}" ]; then
        stop "$idle starts in a row came no further than $newest; see $directory/logs" 1
    fi
    echo "$restart $newest $SLURM_JOB_NODELIST" >> "$job/starts"
    say "goes on from $newest on $SLURM_JOB_NODELIST"
}

# The ranks' environment.
set_environment() {
    local end
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head, which would end before scontrol
    # Another one at each start, for the last start's may not be free yet; below the ports that Linux gives to clients
    # (/proc/sys/net/ipv4/ip_local_port_range, from 32768 on).
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + restart) % 20000))
    export MASTER_ADDR MASTER_PORT
    end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)
    if end=$(date -d "$end" +%s 2>/dev/null); then export SIGHTLINE_END_TIME="$end"; fi
    # A build that was killed leaves a lock on which the next one hangs: use a separate cache for each start.
    export SIGHTLINE_BUILDS="${SIGHTLINE_CACHE:-/tmp}/sightline-$SLURM_JOB_ID-$restart"
    export TORCH_EXTENSIONS_DIR="$SIGHTLINE_BUILDS/torch" TRITON_CACHE_DIR="$SIGHTLINE_BUILDS/triton"
    if [ -n "${SIGHTLINE_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME="$SIGHTLINE_INTERFACE" GLOO_SOCKET_IFNAME="$SIGHTLINE_INTERFACE"
    fi
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
}

# One task per GPU, or one deepspeed per node. Each rank's output is appended to DIRECTORY/logs/rank_00000.log and so
# on.
start_ranks() {
    local gpus=${SLURM_GPUS_ON_NODE:-1} tasks words
    words=("$job/trainer/main.py" "$job/recipe.yaml" --stage "$stage" "${overrides[@]}")
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE / gpus))}"
    if [ "${SIGHTLINE_LAUNCHER:-srun}" = deepspeed ]; then
        tasks=1
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$gpus/" > "$job/hostfile"
        # shellcheck disable=SC2016  # expanded on the node, which knows its number
        words=(bash -c 'exec deepspeed --node_rank="$SLURM_NODEID" "$@"' deepspeed --hostfile="$job/hostfile" --no_ssh
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "${words[@]}")
    else
        tasks=$gpus
        words=(python "${words[@]}")
    fi
    export SIGHTLINE_STAGE="$directory" SIGHTLINE_STARTS="$job/starts"
    # --wait: ends the others when one rank has ended and they have not noticed. The ranks' own watch comes first: it
    #   says whom they wait for, and ends them with a code that blames nobody.
    # --kill-on-bad-exit=0: a site's default may be to kill them at once.
    # --distribution, --cpu-bind: neighbouring ranks on neighbouring cores of one socket, as GPUs are numbered.
    # --cpus-per-task: srun does not inherit it from the job.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" --cpus-per-task="$((SLURM_CPUS_ON_NODE / tasks))" \
        --distribution=block:block --cpu-bind=cores --wait="$(wait_s)" --kill-on-bad-exit=0 \
        --open-mode=append --output="$directory/logs/rank_%5t.log" "${SIGHTLINE_SRUN[@]}" \
        bash "$here/launch.sh" task "${SIGHTLINE_WRAP[@]}" "${words[@]}"
}

# Seconds that the others have after one rank has ended: the ranks' limit, and a minute for its watch to act.
wait_s() {
    local limit
    limit=$(grep -oP '"rank_timeout_s": *\K[0-9]+' "$job/job.json" || echo 900)
    echo "$((limit + 60))"
}

# One rank. It records how and when it ended; a dead or disconnected node records nothing.
task() {
    local code=0
    trap '' USR1 # inherited: a rank handles the signal, and nothing else in the step may die of it
    trap : TERM
    echo "--- job $SLURM_JOB_ID, restart $restart, rank $SLURM_PROCID on $SLURMD_NODENAME, $(date +%FT%T)" || true
    "$@" || code=$?
    if [ "$code" = "$SHELL_ABORTED" ] && died_of_another; then code=$EXIT_LOST_RANK; fi
    echo "$code $(date +%s.%N) $SLURM_PROCID" >> "$here/../ended/$restart/$SLURMD_NODENAME" || true
    if [ "$code" -gt 128 ]; then tell_others "$code" || true; fi
    if [ "$SLURM_LOCALID" = 0 ]; then rm -rf "${SIGHTLINE_BUILDS:?}" || true; fi
    exit "$code"
}

# NCCL's watch ends a process whose peer is gone by SIGABRT. With a CUDA error in its message it was this rank's own GPU.
died_of_another() {
    local log said
    log=$(printf '%s/logs/rank_%05d.log' "${SIGHTLINE_STAGE:-}" "$SLURM_PROCID")
    sleep 1 # the last lines are still on their way through Slurm
    said=$(tac "$log" 2>/dev/null | sed '/^--- job/q' | grep -E "$NCCL_WATCH" || true)
    [ -n "$said" ] && ! grep -q 'CUDA error' <<< "$said"
}
NCCL_WATCH="ProcessGroupNCCL.*[Ww]atchdog|watchdog thread terminated|an instance of 'c10::DistBackendError'"

# A rank that died of a signal tells nobody; under NCCL the others would wait for it. Their watch looks for this file
# (trainer/distributed/failure_notice.py). The first one of a start stays.
tell_others() { # CODE
    local file=${SIGHTLINE_STAGE:-}/ranks/failed.json
    if [ ! -d "${file%/*}" ] || [ "$file" -nt "${SIGHTLINE_STARTS:-}" ]; then return 0; fi
    printf '{"rank": %d, "host": "%s", "code": %d, "line": "ended with %d", "told_s": %s}\n' \
        "$SLURM_PROCID" "$SLURMD_NODENAME" "$EXIT_LOST_RANK" "$1" "$(date +%s.%N)" > "$file.$SLURM_PROCID"
    mv "$file.$SLURM_PROCID" "$file"
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
    trap : TERM # the ranks get it too; this shell waits for them
    start_ranks || code=$?
    if [ "$code" = "$EXIT_FINISHED" ] && [ -f "$directory/finished.json" ]; then
        say "finished: $directory"
        exit "$EXIT_FINISHED"
    fi
    requeue_or_stop "$code"
}

verb=$1
shift
case $verb in
    train) read_site && train "$@" ;;
    run) read_site && run "$@" ;;
    workers) read_site && workers "$@" ;;
    task) task "$@" ;;
    *) echo "launch.sh $verb: train, run, workers or task was expected" >&2 && exit "$EXIT_INPUT_ERROR" ;;
esac
