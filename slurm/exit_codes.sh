#!/usr/bin/env bash
# shellcheck disable=SC2034  # launch.sh and requeue.sh use these
# How a rank ends: the numbers of models/common/exit_codes.py. Any other code: the rank itself failed.
EXIT_FINISHED=0
EXIT_INPUT_ERROR=2 # wrong input
EXIT_REQUEUE=75    # stopped on request, everything saved
EXIT_LOST_RANK=76  # another rank was lost
EXIT_FENCED=77     # another start has taken over the run
# What shells say of a process that SIGABRT ended: 128 + 6.
SHELL_ABORTED=134
