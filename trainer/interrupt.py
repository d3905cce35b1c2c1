"""Being asked to stop: signals and the end of the time that the scheduler gave.

Owns the flag and the exit codes. A handler only sets the flag; the loop asks for it where all ranks are, agrees with
them, saves and leaves with `EXIT_REQUEUE`: run me again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

EXIT_REQUEUE = 75
"""Not finished, everything saved: start the same command again (EX_TEMPFAIL of sysexits.h)."""

EXIT_LOST_RANK = 76
"""A rank died or hangs; the last checkpoint stands, and the same command goes on from it."""

MARGIN_S = 30.0
"""Kept before the deadline beside the time of two steps and two saves as long as the longest so far."""


class Interrupt:
    """A flag that SIGTERM, SIGUSR1, SIGINT or the deadline raise; never lowered."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.reason: str | None = None
        self._pid = os.getpid()
        end = environment.get("SIGHTLINE_END_TIME") or environment.get("SLURM_JOB_END_TIME")
        self.end_time_s = float(end) if end else None
        """Unix time at which the scheduler ends the job."""

    def install(self) -> Interrupt:
        """Take over the signals. A second Ctrl-C stops at once."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child inherits the handler, but the flag is not its business
            return
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def is_due(self, step_s: float, save_s: float) -> bool:
        """Whether to stop after this step, given how long the longest step and save took so far."""
        if self.reason is None and self.end_time_s is not None:
            left_s = self.end_time_s - time.time()
            if left_s < MARGIN_S + 2 * step_s + 2 * save_s:
                self.reason = f"the job's end in {max(0.0, left_s):.0f} s"
        return self.reason is not None
