"""Projected features of images that were asked about lately: another question about one skips the vision encoder.

    digest of an image's pixels --find--> features [P, D], on the model's device

Owns what is kept, by content, up to a number of bytes. Does not own how features are computed (`eval.prefill`).
P image tokens, D the language model's width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """Features by an image's digest, the most recently used ones. Thread-safe. The weights must not change."""

    def __init__(self, limit_bytes: int) -> None:
        self.num_queries = self.num_hits = 0
        self.num_bytes = 0
        self._limit_bytes = limit_bytes
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, digest: bytes) -> Tensor | None:
        """The features of an image, which then count as just used; None where they are not kept."""
        with self._lock:
            found = self._features.get(digest)
            self.num_queries += 1
            if found is not None:
                self.num_hits += 1
                self._features.move_to_end(digest)
            return found

    def keep(self, digest: bytes, features_PD: Tensor) -> None:
        """Store features; beyond the limit the least recently used ones go."""
        if features_PD.nbytes > self._limit_bytes:
            return
        with self._lock:
            before = self._features.pop(digest, None)
            # A copy: features of one image are a part of those that were computed with them.
            self._features[digest] = features_PD.clone()
            self.num_bytes += features_PD.nbytes - (before.nbytes if before is not None else 0)
            while self.num_bytes > self._limit_bytes:
                self.num_bytes -= self._features.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._features.clear()
            self.num_bytes = 0
