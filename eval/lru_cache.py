"""A cache of values by content, up to a number of bytes; those that were used longest ago go first.

features of an image, by a digest of its pixels         another question about it skips the vision encoder
pixels of a chat's images, by digests of their files    another turn about them decodes nothing
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """The values used last. Thread-safe.

    Args:
        limit_bytes: of all values together; a larger one is not kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.num_queries = self.num_hits = 0
        self.num_bytes = 0
        self._limit_bytes = limit_bytes
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Key) -> Value | None:
        """A value, which then counts as just used; None where it is not kept."""
        with self._lock:
            found = self._values.get(key)
            self.num_queries += 1
            if found is None:
                return None
            self.num_hits += 1
            self._values.move_to_end(key)
            return found[0]

    def keep(self, key: Key, value: Value, num_bytes: int) -> None:
        """Store a value that takes so much; beyond the limit the least recently used ones go."""
        if num_bytes > self._limit_bytes:
            return
        with self._lock:
            _, before = self._values.pop(key, (None, 0))
            self._values[key] = (value, num_bytes)
            self.num_bytes += num_bytes - before
            while self.num_bytes > self._limit_bytes:
                self.num_bytes -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._values.clear()
            self.num_bytes = 0
