"""A number of bytes that requests share: who asks first gets first, and asks for no more than there is.

Asked by coroutines and by the page's threads alike. Owns what decoding a query's pictures takes, too.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager

from data_pipeline import limits
from data_pipeline.images import check_header
from eval.query import ImageFile, Query

_PIXEL_BYTES = 16
"""What a picture takes from its header to the end of `encode`; measured 12 to 19 with what the process takes beside."""


def decoding_bytes(query: Query, max_pixels: int = limits.MAX_PIXELS) -> int:
    """The memory that a query's pictures take until they are pixels of the model's, by their headers.

    Raises:
        ImageError: no image, or one beyond the limits.
    """
    num_bytes = 0
    for image in query.images:
        decoder_bytes = 0
        if isinstance(image, ImageFile):
            num_pixels, decoder_bytes = check_header(image.content)
        else:
            num_pixels = image.width * image.height
        if num_pixels > max_pixels:
            raise limits.ImageError(f"image has {num_pixels} pixels; more than {max_pixels} are refused here")
        num_bytes += max(_PIXEL_BYTES * num_pixels, decoder_bytes)
    return num_bytes


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
