"""The exit codes of this project's commands. `slurm/exit_codes.sh` has the same numbers; a test compares the two.

Numbers above 2 are chosen apart from what shells use themselves (126 and up) and from Python's 1 for a traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit code of a command; `docs/training.md` says what to do for each."""

    FINISHED = 0
    INPUT_ERROR = 2
    """Wrong input; one line on stderr says what to correct."""
    REQUEUE = 75
    """Stopped before the end with everything saved, or what it reads from is away: run the same command again.

    EX_TEMPFAIL of sysexits.h.
    """
    LOST_RANK = 76
    """Another rank died or hangs; the same command resumes from the last checkpoint."""
    FENCED = 77
    """Another start has taken over the run directory; this process's uncommitted data are not written."""
    KEYBOARD = 130
    """Ctrl-C: 128 + SIGINT, as shells count it."""
