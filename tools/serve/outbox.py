"""From the engine's thread to the event loop: one wake-up for all that a step of the engine has said.

engine thread: post(outbox, event), …, flush()  --one call_soon_threadsafe-->  event loop: each outbox gets its own
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Outbox(Generic[Event]):
    """The events of one answer, in order. Read on the event loop alone, by one reader."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._wanted: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event, on the event loop."""
        self._events.append(event)
        if self._wanted is not None:
            _fulfil(self._wanted)

    async def get(self, within_s: float) -> list[Event]:
        """Wait for an event, and return all that are there, since what comes within one turn of the loop is one piece;
        none where none came in time.

        Without `asyncio.wait_for`, which makes a task for each wait before Python 3.12.
        """
        if not self._events:
            loop = asyncio.get_running_loop()
            self._wanted = loop.create_future()
            timer = loop.call_later(within_s, _fulfil, self._wanted)
            try:
                await self._wanted
            finally:
                timer.cancel()
                self._wanted = None
        found = list(self._events)
        self._events.clear()
        return found


def _fulfil(wanted: asyncio.Future[None]) -> None:
    if not wanted.done():
        wanted.set_result(None)


class Bridge(Generic[Event]):
    """Takes events in any thread and puts them into outboxes on the loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[Outbox[Event], Event]] = deque()
        self._is_due = False

    def post(self, outbox: Outbox[Event], event: Event) -> None:
        """Put an event on its way; `flush` sends it off."""
        self._posted.append((outbox, event))

    def flush(self) -> None:
        """Wake the loop up, if there is something for it and it is not woken up already."""
        if self._posted and not self._is_due:
            self._is_due = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self._posted.clear()

    def _deliver(self) -> None:
        self._is_due = False  # before the first is taken: what is posted from now on is seen, or wakes the loop again
        while self._posted:
            outbox, event = self._posted.popleft()
            outbox.put(event)
