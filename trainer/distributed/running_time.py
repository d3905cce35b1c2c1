"""Time that this process ran: what every limit of a run is measured in.

A scheduler that suspends a job (SIGSTOP to a whole node, SIGCONT an hour later), a machine that sleeps and a wall clock
that is set while a run is on must not look like a run that stands still. So time is the sum of small steps of the
monotonic clock, of which each counts for `max_gap_s` at most: whoever waits looks at least that often.

    monotonic   0 1 2 3 .......... stopped .......... 3603 3604
    running     0 1 2 3                                  5    6        with max_gap_s = 2
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RunningTime:
    """Seconds in which this process ran since it was made, as long as `seconds` is called every `max_gap_s`.

    Args:
        max_gap_s: what a gap between two calls counts for at most.
        clock: monotonic seconds.
    """

    def __init__(self, max_gap_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_gap_s, self._clock = max_gap_s, clock
        self._lock = threading.Lock()
        self._last_s, self._total_s = clock(), 0.0

    def seconds(self) -> float:
        """The time so far; may be called from any thread."""
        with self._lock:
            now_s = self._clock()
            self._total_s += min(now_s - self._last_s, self._max_gap_s)
            self._last_s = now_s
            return self._total_s
