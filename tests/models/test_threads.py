"""A thread is waited for to its end, also by somebody who was interrupted while waiting."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from models.common.threads import WaitedThread
from tests.support.patience import GUARD_S, wait_until


class InterruptedWaitError(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture
def interruptible() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise InterruptedWaitError

    before = signal.signal(signal.SIGUSR2, interrupt)
    yield
    signal.signal(signal.SIGUSR2, before)


def is_waited_for() -> bool:
    """Whether the main thread is inside of `WaitedThread.wait`."""
    main = threading.main_thread().ident
    assert main is not None
    frame: FrameType | None = sys._current_frames()[main]
    while frame is not None and frame.f_code is not WaitedThread.wait.__code__:
        frame = frame.f_back
    return frame is not None


def test_who_was_interrupted_still_waits_for_the_end(interruptible: None) -> None:
    go_on, done = threading.Event(), list[str]()

    def work(text: str) -> None:
        wait_until("the main thread waits", is_waited_for)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert go_on.wait(GUARD_S)
        done.append(text)

    thread = WaitedThread(work, ("written",), name="worker")
    thread.start()
    with pytest.raises(InterruptedWaitError):
        thread.wait()
    assert not thread.has_ended
    threading.Timer(0.05, go_on.set).start()
    thread.wait()
    assert done == ["written"]
    thread.wait()
    assert all(each.name != "worker" for each in threading.enumerate())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_raises_has_ended() -> None:
    thread = WaitedThread(lambda: 1 / 0, name="worker")
    thread.start()
    thread.wait()
    assert thread.has_ended
