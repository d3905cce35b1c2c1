"""Several sources as one stream, by arithmetic: the n-th draw of a slot -> (source, sample in that source).

Owns the choice of the source. Without weights the sources are one long set and an epoch holds every sample once; with
weights every block of draws holds a fixed quota of each source, in a seeded order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipeline.order import IntArray, Order, permutation
from models.common.errors import InputError

BLOCK_DRAWS = 1000
"""Draws in a block of the mixture: shares are exact to 1/2,000 in every such block."""

_MIXTURE = 3  # named random stream, distinct from those of `order`


class Plan(Protocol):
    """Maps each draw to a source and a sample in it. `sample_order` adds the sample's name."""

    def locate(self, slot: int, n: int) -> tuple[int, int]:
        """(source, sample within the source) of the n-th draw of a slot."""
        ...

    def locate_all(self, slot: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """`locate` of the draws [start, stop) of a slot, as two columns."""
        ...

    def slot_length(self, slot: int) -> int:
        """Draws of one epoch in this slot."""
        ...


class Concatenation:
    """Sources without weights: one set, seen exactly once an epoch."""

    def __init__(self, source_shards: Sequence[Sequence[int]], seed: int, num_slots: int, window: int) -> None:
        sizes = [size for shards in source_shards for size in shards]
        self._ends: IntArray = np.cumsum([sum(shards) for shards in source_shards], dtype=np.int64)
        self._order = Order(sizes, seed, num_slots, window)

    def locate(self, slot: int, n: int) -> tuple[int, int]:
        """See `Plan`."""
        sample = self._order.sample(slot, n)
        source = int(np.searchsorted(self._ends, sample, side="right"))
        return source, sample - (int(self._ends[source - 1]) if source else 0)

    def locate_all(self, slot: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """See `Plan`."""
        samples = self._order.samples(slot, start, stop)
        sources = np.searchsorted(self._ends, samples, side="right")
        return sources, samples - np.concatenate([[0], self._ends])[sources]

    def slot_length(self, slot: int) -> int:
        """See `Plan`."""
        return self._order.slot_length(slot)


class Mixture:
    """Sources with weights. A source starts over when it is used up; an epoch is as many draws as there are samples."""

    def __init__(
        self,
        source_shards: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
        num_slots: int,
        window: int,
    ) -> None:
        self.seed = seed
        self._orders = [Order(shards, seed + index, num_slots, window) for index, shards in enumerate(source_shards)]
        self._quotas = quotas(weights, BLOCK_DRAWS)
        self._sources: IntArray = np.repeat(np.arange(len(weights)), self._quotas)
        self._block_cache: dict[int, tuple[int, IntArray, IntArray]] = {}
        for index, order in enumerate(self._orders):
            if order.num_samples < num_slots:
                raise InputError(
                    f"source {index} has {order.num_samples} samples, fewer than the {num_slots} rows of the global"
                    " batch: leave out the weights, or make the source larger"
                )

    def locate(self, slot: int, n: int) -> tuple[int, int]:
        """See `Plan`."""
        block, inside = divmod(n, BLOCK_DRAWS)
        sources, ranks = self._block(slot, block)
        source = int(sources[inside])
        draw = block * int(self._quotas[source]) + int(ranks[inside])
        return source, self._orders[source].sample(slot, draw)

    def locate_all(self, slot: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """See `Plan`."""
        sources, samples = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        for n in range(start - start % BLOCK_DRAWS, stop, BLOCK_DRAWS):
            low, high = max(start, n), min(stop, n + BLOCK_DRAWS)
            here, ranks = (column[low - n : high - n] for column in self._block(slot, n // BLOCK_DRAWS))
            sources[low - start : high - start] = here
            for source in np.unique(here).tolist():
                draws = n // BLOCK_DRAWS * int(self._quotas[source]) + ranks[here == source]
                found = self._orders[source].samples(slot, int(draws[0]), int(draws[-1]) + 1)
                samples[low - start : high - start][here == source] = found
        return sources, samples

    def slot_length(self, slot: int) -> int:
        """See `Plan`."""
        return sum(order.slot_length(slot) for order in self._orders)

    def _block(self, slot: int, block: int) -> tuple[IntArray, IntArray]:
        """Source of each draw of a block, and how many draws of that source precede it in the block."""
        cached = self._block_cache.get(slot)
        if cached is None or cached[0] != block:
            sources = self._sources[permutation(BLOCK_DRAWS, self.seed, _MIXTURE, slot, block)]
            ranks = np.zeros(BLOCK_DRAWS, dtype=np.int64)
            for source in range(len(self._orders)):
                places = np.flatnonzero(sources == source)
                ranks[places] = np.arange(len(places))
            cached = (block, sources, ranks)
            self._block_cache[slot] = cached
        return cached[1], cached[2]


def quotas(weights: Sequence[float], total: int) -> IntArray:
    """Whole numbers that sum to `total` in proportion to the weights (largest remainders), at least 1 each."""
    shares = np.asarray(weights, dtype=np.float64)
    exact = shares / shares.sum() * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = total - int(counts.sum())
    if missing >= 0:
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    else:
        counts[np.argmax(counts)] += missing
    return counts
