"""The order of a stream as arithmetic: which sample is the n-th draw of a slot. Results depend only on the arguments.

Owns the permutation of shards, the cut into slots and the shuffle within windows. Does not own mixing of sources
(`mixture`) nor reading.

A slot is a row of the global batch with its own run of samples.

    epoch e:   shards in the order permuted by (seed, e)
               |--------slot 0--------|--------slot 1--------|--------slot 2--------|   contiguous ranges
               [window][window][wind] [window][window][wind] [window][window][wind]     shuffled inside

Samples of a shard stay together (reads are sequential within a window), an epoch holds every sample exactly once, and
any draw is found without visiting the draws before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.common.errors import InputError

IntArray = NDArray[np.int64]

_SHARDS, _WINDOW = 1, 2  # named random streams: what a permutation is for


def permutation(length: int, *key: int) -> IntArray:
    """A permutation of range(length) that depends only on `key`.

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
        self._epoch_cache: dict[int, tuple[IntArray, IntArray]] = {}
        """Two epochs: near the end of one, some slots are already in the next."""
        self._window_cache: dict[int, tuple[int, int, IntArray]] = {}

    def slot_start(self, slot: int) -> int:
        """The start of a slot's range in the concatenation of an epoch's permuted shards."""
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

    def samples(self, slot: int, start: int, stop: int) -> IntArray:
        """The samples of draws [start, stop) of a slot: `sample` of each, a window at a time."""
        length, parts, n = self.slot_length(slot), [], start
        while n < stop:
            epoch, offset = divmod(n, length)
            block, inside = divmod(offset, self.window)
            shuffled = self._window_permutation(slot, epoch, block, min(self.window, length - block * self.window))
            taken = shuffled[inside : inside + stop - n]
            parts.append(self._all_at(epoch, self.slot_start(slot) + block * self.window + taken))
            n += len(taken)
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _at(self, epoch: int, position: int) -> int:
        """The sample at `position` of the epoch's concatenation."""
        shards, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[place])
        return int(self._starts[shard] + position - (ends[place] - self._sizes[shard]))

    def _all_at(self, epoch: int, positions: IntArray) -> IntArray:
        """`_at` of each."""
        shards, ends = self._epoch(epoch)
        places = np.searchsorted(ends, positions, side="right")
        chosen = shards[places]
        found: IntArray = self._starts[chosen] + positions - (ends[places] - self._sizes[chosen])
        return found

    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The shards in an epoch's order, and where each ends in their concatenation."""
        if epoch not in self._epoch_cache:
            shards = permutation(len(self._sizes), self.seed, _SHARDS, epoch)
            latest = list(self._epoch_cache.items())[-1:]
            self._epoch_cache = dict([*latest, (epoch, (shards, np.cumsum(self._sizes[shards])))])
        return self._epoch_cache[epoch]

    def _window_permutation(self, slot: int, epoch: int, block: int, length: int) -> IntArray:
        """The permutation of one window; each slot's last one is cached, since draws come in order."""
        cached = self._window_cache.get(slot)
        if cached is None or cached[:2] != (epoch, block):
            shuffled = permutation(length, self.seed, _WINDOW, epoch, slot, block)
            cached = (epoch, block, shuffled)
            self._window_cache[slot] = cached
        return cached[2]
