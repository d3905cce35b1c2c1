"""Threads whose end is waited for, also by somebody who was interrupted while waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class WaitedThread:
    """A thread that `wait` waits for, as often as it is called.

    Not `threading.Thread.join`: interrupted by an exception of a signal handler, such as Ctrl-C's, it takes the thread
    for ended in Python 3.11 and older (threading.py, `_wait_for_tstate_lock`). Whoever joins again while cleaning up
    then goes on at once, and what the thread still writes to is given away under it.

    Args:
        is_daemon: whether the process may end while it runs.
    """

    def __init__(
        self, work: Callable[..., object], arguments: tuple[Any, ...] = (), *, name: str, is_daemon: bool = False
    ) -> None:
        self._work, self._arguments = work, arguments
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=is_daemon)

    def start(self) -> None:
        """Begin its work."""
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether its work is over, also where that raised."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Until its work is over."""
        self._ended.wait()
        self._thread.join()  # at once, and it is of no account where this is interrupted

    def _run(self) -> None:
        try:
            self._work(*self._arguments)
        finally:
            self._ended.set()
