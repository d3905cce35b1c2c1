"""Whether every rank's process runs while a run starts, when no collective and no watchdog can tell.

Each rank counts a number of its own in the ranks' store upwards, and watches the number of the rank before it:

    rank 0 <-- rank 1 <-- rank 2 <-- rank 3        3 is watched by 0
             (stopped)                             2 sees that 1's number stands still

So however many of them are stopped, a rank that runs watches one that does not, at three requests a second and rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trainer.distributed.context import DistributedContext
from trainer.distributed.running_time import RunningTime

INTERVAL_S = 1.0
"""Between two beats of a rank."""


class Pulse:
    """This rank's beat in the store, and its look at the rank before it. Called from one thread, every `INTERVAL_S`."""

    def __init__(self, ranks: DistributedContext, store: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.watched = (ranks.rank - 1) % ranks.world_size
        self._store, self._rank = store, ranks.rank
        self._running = RunningTime(2 * INTERVAL_S, clock)
        self._beaten_s = -INTERVAL_S
        self._seen, self._moved_s = -1, 0.0

    def beat(self) -> float:
        """Count upwards where it is time to; how many seconds of this process's running the watched rank has not."""
        now_s = self._running.seconds()
        if now_s - self._beaten_s >= INTERVAL_S:
            self._beaten_s = now_s
            self._store.add(_key(self._rank), 1)
            seen = self._store.add(_key(self.watched), 0)
            if seen != self._seen:
                self._seen, self._moved_s = seen, now_s
        return now_s - self._moved_s


def _key(rank: int) -> str:
    return f"sightline/beat/{rank}"
