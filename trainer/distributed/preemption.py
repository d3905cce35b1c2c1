"""Requests to stop: signals, and the end of the scheduler's time limit.

Owns the request only. A signal handler records it; the loop agrees with the other ranks in the sum of the step, saves,
and exits with `ExitCode.REQUEUE`: start the same command again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

from models.common.errors import InputError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A scheduler's end, Slurm's early warning (`--signal=USR1@180` in slurm/), Ctrl-C."""

MARGIN_S = 30.0
"""Margin before the deadline, added to the time of two steps and two saves as long as the longest so far."""


class PreemptionHandler:
    """A request to stop, made by a signal or the deadline and never withdrawn.

    Args:
        end_time_s: Unix time at which the scheduler ends the job; None where it sets no end.
    """

    def __init__(self, *, end_time_s: float | None = None) -> None:
        self.end_time_s = end_time_s
        self.reason: str | None = None
        """The reason of the request, for messages: a signal's name or the job's end; None without a request."""
        self._pid = os.getpid()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> PreemptionHandler:
        """A handler with the job's end: SIGHTLINE_END_TIME, else what Slurm set; call `install` for the signals.

        Raises:
            InputError: the time is not a number.
        """
        for name in ("SIGHTLINE_END_TIME", "SLURM_JOB_END_TIME"):
            value = environment.get(name)
            if not value:
                continue
            try:
                return cls(end_time_s=float(value))
            except ValueError:
                raise InputError(f"{name}: found {value!r} in the environment; expected Unix seconds") from None
        return cls()

    def install(self) -> PreemptionHandler:
        """Take over `SIGNALS` in the main thread; returns itself. A second Ctrl-C then stops at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked data worker inherits the handler; the request does not concern it
            return
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def is_due(self, step_s: float, save_s: float) -> bool:
        """Whether to stop after this step.

        Args:
            step_s: how long the longest step took so far.
            save_s: how long the longest save took so far.
        """
        if self.reason is None and self.end_time_s is not None:
            left_s = self.end_time_s - time.time()
            if left_s < MARGIN_S + 2 * step_s + 2 * save_s:
                self.reason = f"the job's end in {max(0.0, left_s):.0f} s"
        return self.reason is not None
