"""The line of waiting requests: its pace, and what those are told who come too late."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from eval.requests import EngineDead, QueueFull
from eval.waiting import BROKEN, CLOSING, WaitingLine


class Clock:
    """The time that a line sees."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("eval.waiting.time", clock)
    return clock


def waiting(line: WaitingLine, count: int) -> None:
    for _ in range(count):
        line.add(request())


def request() -> Any:
    class Request:
        cancelled = threading.Event()

    return Request()


def test_a_full_line_says_when_it_may_be_empty_by_the_pace_of_the_last_answers(clock: Clock) -> None:
    line = WaitingLine(10)
    line.open()
    waiting(line, 10)
    clock.now_s += 0.5
    with pytest.raises(QueueFull) as first:
        line.add(request())
    assert first.value.retry_after_s == pytest.approx(5.0), "no answer yet: as long as the first has taken so far"
    for _ in range(3):
        clock.now_s += 2.0 - 0.5 * (clock.now_s == 100.5)
        line.answered()
    with pytest.raises(QueueFull) as later:
        line.add(request())
    assert later.value.retry_after_s == pytest.approx(20.0)
    clock.now_s += 600.0
    assert line.retry_after_s() == 60.0
    line.take_all()
    assert line.retry_after_s() == 1.0


def test_time_without_work_says_nothing_of_the_pace(clock: Clock) -> None:
    line = WaitingLine(10)
    line.open()
    begun, ended = threading.Event(), []

    def wait() -> None:
        begun.set()
        ended.append(line.wait_for_work(lambda: False))

    thread = threading.Thread(target=wait)
    thread.start()
    begun.wait()
    clock.now_s += 600.0
    waiting(line, 4)
    thread.join()
    assert ended == [True]
    clock.now_s += 2.0
    line.answered()
    assert line.retry_after_s() == pytest.approx(8.0)


@pytest.mark.parametrize(("whys", "told"), [((), CLOSING), ((BROKEN,), BROKEN), ((BROKEN, CLOSING), BROKEN)])
def test_the_first_reason_to_close_is_what_callers_are_told(whys: tuple[str, ...], told: str) -> None:
    line = WaitingLine(1)
    for why in whys or (None,):
        line.close() if why is None else line.close(why)
    with pytest.raises(EngineDead, match=told):
        line.add(request())
