"""The requests that wait for a row, in the order of their arrival, and whether the engine takes any.

    loading --open--> serving --drain--> draining --close--> dead

Thread-safe. Owns the queue and the engine's state. Does not own which requests fit (`eval.engine`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from eval.requests import Draining, EngineDead, QueueFull, Refused, Request, State

CLOSING = "the server is closing: ask again in a minute"
BROKEN = "the model does not answer any more; the server's log says more"
CLOSING_S = 30.0
"""After which another process may have taken its place."""


class WaitingLine:
    """At most `limit` requests; callers add them, the engine's thread takes them."""

    def __init__(self, limit: int) -> None:
        self.state: State = "loading"
        self._limit = limit
        self._changed = threading.Condition()
        self._requests: deque[Request] = deque()
        self._rejected = {kind.reason: 0 for kind in (QueueFull, Draining, EngineDead)}
        self._seconds_an_answer: float | None = None
        self._since_s = time.monotonic()
        """When the last answer ended, or when work came after there was none."""
        self.why = BROKEN
        """Why nothing is taken any more, once it is dead."""

    def __len__(self) -> int:
        return len(self._requests)

    def rejected(self) -> dict[str, int]:
        """How many requests were refused, by reason."""
        with self._changed:
            return dict(self._rejected)

    def add(self, request: Request) -> None:
        """Put a request at the end; raises `Refused` where none is taken."""
        with self._changed:
            refusal = self._refusal()
            if refusal is not None:
                self._rejected[refusal.reason] += 1
                raise refusal
            self._requests.append(request)
            self._changed.notify_all()

    def _refusal(self) -> Refused | None:
        if self.state == "dead":
            return EngineDead(self.why, CLOSING_S)
        if self.state == "draining":
            return Draining(CLOSING, CLOSING_S)
        if len(self._requests) >= self._limit:
            return QueueFull("too many requests are waiting: ask again later", self.retry_after_s())
        return None

    def retry_after_s(self) -> float:
        """When those who wait now may be answered: so many answers, at the pace of the last ones; from 1 to 60 s.

        Where the next one takes longer than the pace, or is the first of all, as long as it has taken so far.
        """
        pace_s = max(self._seconds_an_answer or 0.0, time.monotonic() - self._since_s)
        return min(max(len(self._requests) * pace_s, 1.0), 60.0)

    def answered(self) -> None:
        """An answer has ended, which tells the pace."""
        now_s = time.monotonic()
        took_s = now_s - self._since_s
        before_s = took_s if self._seconds_an_answer is None else self._seconds_an_answer
        self._seconds_an_answer, self._since_s = before_s + 0.1 * (took_s - before_s), now_s

    def take_cancelled(self) -> list[Request]:
        """Take out the requests that nobody waits for."""
        with self._changed:
            cancelled = [request for request in self._requests if request.cancelled.is_set()]
            for request in cancelled:
                self._requests.remove(request)
        return cancelled

    def take(self, fits: Callable[[Request, list[Request]], bool]) -> list[Request]:
        """Take requests from the front for as long as the next one fits beside those that were taken."""
        taken: list[Request] = []
        with self._changed:
            while self._requests and fits(self._requests[0], taken):
                taken.append(self._requests.popleft())
        return taken

    def take_all(self) -> list[Request]:
        """Take out all requests."""
        return self.take(lambda request, taken: True)

    def open(self) -> None:
        """Requests are answered from now on."""
        with self._changed:
            if self.state == "loading":
                self.state = "serving"

    def close(self, why: str = CLOSING) -> None:
        """Take nothing any more, and end the engine's thread; the first reason is what callers are told."""
        with self._changed:
            if self.state != "dead":
                self.state, self.why = "dead", why
            self._changed.notify_all()

    def wait_for_work(self, is_busy: Callable[[], bool]) -> bool:
        """Wait until there is something to do: True, or until the end: False. Called after each turn."""
        with self._changed:
            self._changed.notify_all()  # a drain may wait for the last answer
            if not self._requests and not is_busy():
                self._changed.wait_for(lambda: self.state == "dead" or self._requests)
                self._since_s = time.monotonic()  # time without work says nothing of the pace
            return self.state != "dead"

    def drain(self, grace_s: float, is_busy: Callable[[], bool]) -> bool:
        """Take nothing new, and wait until all that was taken has ended; returns whether it has within the time."""
        with self._changed:
            if self.state != "dead":
                self.state = "draining"
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._requests and not is_busy(), grace_s)
