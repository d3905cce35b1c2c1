"""A rank whose process stands still is seen by one whose process runs."""

from __future__ import annotations

from collections import Counter

import pytest

from trainer.distributed.context import DistributedContext
from trainer.distributed.pulse import Pulse


class Store(Counter[str]):
    """The one method of torch's store that is used."""

    def add(self, key: str, amount: int) -> int:
        self[key] += amount
        return self[key]


@pytest.mark.parametrize("stopped", [{0}, {2}, {1, 2}, {0, 2}, {0, 1}])
def test_somebody_who_runs_watches_somebody_who_is_stopped(stopped: set[int]) -> None:
    now_s = 0.0
    store = Store()
    pulses = [Pulse(DistributedContext(rank, 3), store, lambda: now_s) for rank in range(3)]
    silent_s: dict[int, float] = {}
    for _ in range(40):
        now_s += 0.25
        for rank, pulse in enumerate(pulses):
            if now_s < 2.0 or rank not in stopped:
                silent_s[rank] = pulse.beat()
    found = {pulse.watched for rank, pulse in enumerate(pulses) if rank not in stopped and silent_s[rank] > 5.0}
    assert found
    assert found <= stopped
    assert all(silent_s[rank] < 2.0 for rank in {0, 1, 2} - stopped if pulses[rank].watched not in stopped)
