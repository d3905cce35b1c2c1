"""Time in which a process did not run is not counted, whatever the clocks did meanwhile."""

from __future__ import annotations

from trainer.distributed.running_time import RunningTime


class Clock:
    def __init__(self) -> None:
        self.now_s = 1e6

    def __call__(self) -> float:
        return self.now_s


def test_small_steps_count_in_full_and_a_gap_counts_for_its_limit() -> None:
    clock = Clock()
    running = RunningTime(2.0, clock)
    for _ in range(10):
        clock.now_s += 1.5
        running.seconds()
    assert running.seconds() == 15.0
    clock.now_s += 8 * 3600  # suspended for a night
    assert running.seconds() == 17.0
    assert running.seconds() == 17.0
