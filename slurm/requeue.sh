#!/usr/bin/env bash
# shellcheck disable=SC2154  # launch.sh sets what is used here
# For launch.sh: ranks have ended and the stage has not. What becomes of the job, and on which nodes.
# Exit codes of a rank: 0 finished, 2 something to mend, 75 saved because it was asked to stop, 76 another rank was
# lost, 77 another start has taken the run over; any other: it failed by itself.

requeue_or_stop() {
    local code=$1 state restarts bad
    if [ "$code" = 0 ]; then code=1; fi # nobody failed, and yet it is not finished: what comes after must not start
    # A rank that found something to mend says so with 2; the others may have seen no more than that it was gone.
    if grep -qx 2 "$job/ended/$restart"/* 2>/dev/null; then code=2; fi
    if [ "$code" = 2 ]; then stop "there is something to mend, see $directory/logs/rank_00000.log" 2; fi
    trap '' TERM # a job that is queued again is told to end, and so are commands of this shell; KillWait is enough
    wait_for_slurm || stop "ranks ended with $code, and Slurm does not answer" "$code"
    bad=$(bad_nodes)
    state=$(field JobState) restarts=$(field Restarts)
    if [ "$restarts" != "$restart" ] && [ "$state" = RUNNING ]; then
        stop "this node was cut off; the job runs elsewhere" "$code"
    elif [ "$restarts" != "$restart" ]; then
        say "ranks ended with $code; Slurm has queued the job again"
    elif [ "$state" != RUNNING ]; then
        stop "ranks ended with $code; Slurm has ended the job: cancelled, or out of time" "$code"
    elif [ "$code" = 77 ]; then
        stop "another start has taken $directory over" 77
    elif [ "$restart" -ge "${SIGHTLINE_MAX_RESTARTS:-100}" ]; then
        stop "ranks ended with $code after $restart restarts, which is as many as are allowed" 1
    else
        say "ranks ended with $code; queues itself again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    # shellcheck disable=SC2086  # words
    if [ "$code" != 75 ] && [ -n "$bad" ]; then exclude $bad; fi
    exit "$code"
}

# Nodes that Slurm calls down, on which a rank failed by itself, or which say nothing while others do. All of several
# nodes at once are not bad: then it is the run.
bad_nodes() {
    local node noted state bad=()
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        noted=$job/ended/$restart/$node
        state=$(sinfo --noheader --nodes "$node" --format %T | sed -n 1p)
        if [[ $state =~ ^(down|fail|drain|error)|\*$ ]]; then
            bad+=("$node")
        elif [ -f "$noted" ] && grep -qvE '^(0|75|76|77)$' "$noted"; then
            bad+=("$node")
        elif [ ! -f "$noted" ] && [ -n "$(ls "$job/ended/$restart")" ]; then
            bad+=("$node")
        fi
    done
    if [ "${#bad[@]}" -lt "$SLURM_JOB_NUM_NODES" ] || [ "$SLURM_JOB_NUM_NODES" = 1 ]; then echo "${bad[@]}"; fi
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

# The controller may be starting anew, or this node be cut off for a while.
wait_for_slurm() {
    local try
    for try in {1..30}; do
        if [ -n "$(field JobState)" ]; then return 0; fi
        if [ "$try" = 1 ]; then say "Slurm does not answer; waiting for it for a while"; fi
        sleep 10
    done
    return 1
}

# Of this job, as Slurm knows it now; empty where there is none.
field() {
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -oP "(?<= $1=)\S+" | grep -vxF '(null)' || true
}
