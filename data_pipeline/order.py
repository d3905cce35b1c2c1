"""The order of a stream as arithmetic: which sample is draw n of slot i. Nothing is remembered between calls.

Owns the permutation of shards, the cut into slots and the shuffle inside windows. Does not own mixing of sources
(`mixture`) nor reading.

    epoch e:   shards in the order permuted by (seed, e)
               |--------slot 0--------|--------slot 1--------|--------slot 2--------|   contiguous ranges
               [window][window][wind] [window][window][wind] [window][window][wind]     shuffled inside

Samples stay near their shard (reads are sequential within a window), an epoch holds every sample exactly once, and
any draw is found without visiting the draws before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.errors import InputError

IntArray = NDArray[np.int64]

_SHARDS, _WINDOW = 1, 2  # named random streams: what a permutation is for


def permutation(length: int, *key: int) -> IntArray:
    """A permutation of range(length) that depends on `key` alone.

    Sorts raw Philox words: numpy promises that a bit generator's words never change between its versions, which it
    does not promise for `Generator.permutation` (NEP 19).
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(words, kind="stable")


class Order:
    """Order of one shard set for `num_slots` slots. Pure: equal arguments give equal samples, on any machine."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, num_slots: int, window: int) -> None:
        if num_slots < 1 or window < 1:
            raise InputError(f"num_slots and window must be at least 1, found {num_slots} and {window}")
        self.seed = seed
        self.num_slots = num_slots
        self.window = window
        self._sizes: IntArray = np.asarray(shard_sizes, dtype=np.int64)
        self._starts: IntArray = np.concatenate([[0], np.cumsum(self._sizes)])
        self.num_samples = int(self._starts[-1])
        self._epoch_cache: tuple[int, IntArray, IntArray] | None = None
        self._window_cache: dict[int, tuple[int, int, IntArray]] = {}

    def slot_start(self, slot: int) -> int:
        """Where slot's range begins in the concatenation of an epoch's permuted shards."""
        return slot * self.num_samples // self.num_slots

    def slot_length(self, slot: int) -> int:
        """Draws of one epoch in this slot; lengths of two slots differ by one at most."""
        return self.slot_start(slot + 1) - self.slot_start(slot)

    def sample(self, slot: int, n: int) -> int:
        """Index, within the shard set, of the n-th draw of a slot (epochs follow each other without a gap)."""
        length = self.slot_length(slot)
        if length == 0:
            raise IndexError(f"slot {slot} is empty: {self.num_samples} samples for {self.num_slots} slots")
        epoch, offset = divmod(n, length)
        block, inside = divmod(offset, self.window)
        shuffled = self._window_permutation(slot, epoch, block, min(self.window, length - block * self.window))
        position = self.slot_start(slot) + block * self.window + int(shuffled[inside])
        return self._at(epoch, position)

    def _at(self, epoch: int, position: int) -> int:
        """The sample at `position` of the epoch's concatenation."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            shards = permutation(len(self._sizes), self.seed, _SHARDS, epoch)
            ends = np.cumsum(self._sizes[shards])
            self._epoch_cache = (epoch, shards, ends)
        _, shards, ends = self._epoch_cache
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[place])
        return int(self._starts[shard] + position - (ends[place] - self._sizes[shard]))

    def _window_permutation(self, slot: int, epoch: int, block: int, length: int) -> IntArray:
        """The shuffle of one window; the last one of each slot is kept, for draws come in order."""
        cached = self._window_cache.get(slot)
        if cached is None or cached[:2] != (epoch, block):
            shuffled = permutation(length, self.seed, _WINDOW, epoch, slot, block)
            cached = (epoch, block, shuffled)
            self._window_cache[slot] = cached
        return cached[2]
