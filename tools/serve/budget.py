"""A number of bytes that requests share: who asks first gets first, and asks for no more than there is.

Asked by coroutines and by the page's threads alike.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager


class Budget:
    """`num_bytes` in all. Do not take from one budget twice: the second would wait for the first."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.num_taken = num_bytes, 0
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._lock = threading.Lock()

    @asynccontextmanager
    async def taken(self, num_bytes: int, timeout_s: float) -> AsyncIterator[None]:
        """Hold so many bytes within the block.

        Raises:
            TimeoutError: they were not free in time.
        """
        granted = self._ask(num_bytes)
        try:
            if not granted.done():
                await asyncio.wait_for(asyncio.wrap_future(granted), timeout_s)
            yield
        finally:
            self._end(num_bytes, granted)

    @contextmanager
    def taken_by_thread(self, num_bytes: int, timeout_s: float) -> Iterator[None]:
        """The same for a thread."""
        granted = self._ask(num_bytes)
        try:
            granted.result(timeout_s)
            yield
        finally:
            self._end(num_bytes, granted)

    def _ask(self, num_bytes: int) -> Future[None]:
        if num_bytes > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes of {self.num_bytes} were asked for")
        granted: Future[None] = Future()
        with self._lock:
            self._waiting.append((num_bytes, granted))
        self._grant()
        return granted

    def _end(self, num_bytes: int, granted: Future[None]) -> None:
        if not granted.cancel():  # it was granted, whether or not anybody waited for it then
            with self._lock:
                self.num_taken -= num_bytes
        self._grant()

    def _grant(self) -> None:
        granted: list[Future[None]] = []
        with self._lock:
            while self._waiting:
                num_bytes, future = self._waiting[0]
                if not future.cancelled() and self.num_taken + num_bytes > self.num_bytes:
                    break
                self._waiting.popleft()
                if future.set_running_or_notify_cancel():
                    self.num_taken += num_bytes
                    granted.append(future)
        for future in granted:
            future.set_result(None)
