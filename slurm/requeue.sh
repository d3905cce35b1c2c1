#!/usr/bin/env bash
# shellcheck disable=SC2154  # launch.sh sets these variables
# For launch.sh: ranks have ended and the stage has not. Decides whether the job is requeued, and on which nodes.
# The exit codes are in exit_codes.sh, which launch.sh reads first.

requeue_or_stop() {
    local code=$1 state restarts bad
    # No rank failed, but the stage is not finished: dependent jobs must not start.
    if [ "$code" = "$EXIT_FINISHED" ]; then code=1; fi
    # A rank that found wrong input has its own exit code; the others may only have seen that it was gone.
    if grep -qE "^$EXIT_INPUT_ERROR( |\$)" "$job/ended/$restart"/* 2>/dev/null; then code=$EXIT_INPUT_ERROR; fi
    if [ "$code" = "$EXIT_INPUT_ERROR" ]; then
        stop "there is something to mend, see $directory/logs/rank_00000.log" "$code"
    fi
    trap '' TERM # a requeued job gets TERM, and so do commands of this shell; KillWait gives them enough time
    wait_for_slurm || stop "ranks ended with $code, and Slurm does not answer" "$code"
    bad=$(bad_nodes)
    state=$(field JobState) restarts=$(field Restarts)
    if [ "$restarts" != "$restart" ] && [ "$state" = RUNNING ]; then
        stop "this node was cut off; the job runs elsewhere" "$code"
    elif [ "$restarts" != "$restart" ]; then
        say "ranks ended with $code; Slurm has queued the job again"
    elif [ "$state" != RUNNING ]; then
        stop "ranks ended with $code; Slurm has ended the job: cancelled, or out of time" "$code"
    elif [ "$code" = "$EXIT_FENCED" ]; then
        stop "another start has taken $directory over" "$code"
    elif [ "$restart" -ge "${SIGHTLINE_MAX_RESTARTS:-100}" ]; then
        stop "ranks ended with $code after $restart restarts, which is as many as are allowed" 1
    else
        say "ranks ended with $code; queues itself again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    # shellcheck disable=SC2086  # split into arguments
    if [ "$code" != "$EXIT_REQUEUE" ] && [ -n "$bad" ]; then exclude $bad; fi
    exit "$code"
}

# The nodes that failed first; whoever dies of another's death is not to blame. In this order: nodes that Slurm calls
# down; those that record nothing while others do, unless srun itself killed what was left; those on which a rank failed
# before any other. If all of several nodes fail at once, the run is the cause, not the nodes.
bad_nodes() {
    local node state down=() silent=() bad=()
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        state=$(sinfo --noheader --nodes "$node" --format %T | sed -n 1p)
        if [[ $state =~ ^(down|fail|drain|error)|\*$ ]]; then
            down+=("$node")
        elif [ ! -f "$job/ended/$restart/$node" ] && [ -n "$(ls "$job/ended/$restart")" ]; then
            silent+=("$node")
        fi
    done
    mapfile -t bad < <(failed_first)
    if [ "${#down[@]}" -gt 0 ]; then
        bad=("${down[@]}")
    elif [ "${#silent[@]}" -gt 0 ] && { [ "${#bad[@]}" = 0 ] || ! srun_killed; }; then
        bad=("${silent[@]}")
    fi
    if [ "${#bad[@]}" -lt "$SLURM_JOB_NUM_NODES" ] || [ "$SLURM_JOB_NUM_NODES" = 1 ]; then echo "${bad[@]}"; fi
}

# Nodes with a rank that failed by itself, no later than two seconds after the first one: clocks differ.
failed_first() {
    awk -v others="^($EXIT_FINISHED|$EXIT_REQUEUE|$EXIT_LOST_RANK|$EXIT_FENCED)\$" '
        $1 !~ others {
            node = FILENAME
            sub(".*/", "", node)
            if (!(node in at) || $2 + 0 < at[node]) at[node] = $2 + 0
            if (first == "" || $2 + 0 < first) first = $2 + 0
        }
        END { for (node in at) if (at[node] <= first + 2) print node }
    ' "$job/ended/$restart"/* 2>/dev/null || true
}

# Whether the first rank ended so long ago that srun has ended the others: they could record nothing.
srun_killed() {
    local first
    first=$(awk 'first == "" || $2 + 0 < first { first = $2 + 0 } END { printf "%d", first }' "$job/ended/$restart"/*)
    [ "$(($(date +%s) - first))" -ge "$(wait_s)" ]
}

# Keep the job off nodes from now on, while its partition has enough others.
exclude() {
    local before all left
    before=$(field ExcNodeList)
    all=$(tr ' ' , <<< "$*")${before:+,$before}
    left=$(sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --states idle,allocated,mixed,completing \
        --format %N | sort -u | grep -cvxF -f <(scontrol show hostnames "$all") || true)
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then
        say "not excluded, for there are too few other nodes: $*"
    elif scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$all"; then
        say "excluded: $*"
    fi
}

# The controller may be restarting, or this node disconnected for a while.
wait_for_slurm() {
    local try
    for try in {1..30}; do
        if [ -n "$(field JobState)" ]; then return 0; fi
        if [ "$try" = 1 ]; then say "Slurm does not answer; waiting for it for a while"; fi
        sleep 10
    done
    return 1
}

# A field of this job, as Slurm has it now; empty where there is none.
field() {
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -oP "(?<= $1=)\S+" | grep -vxF '(null)' || true
}
