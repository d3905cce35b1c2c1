"""Copies the next tars of a rank's slots from their remote address while the current ones are being read.

Owns one thread and how far ahead it goes. Which tars come next is arithmetic (`data_pipeline.mixture`); copying,
retrying and evicting are `data_pipeline.remote`'s. A tar that cannot be copied is left to its reader, which names it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import suppress

from data_pipeline.sample_order import SampleOrder
from models.common.cores import unbound

AHEAD_DRAWS = 1024
"""How many draws of each slot are looked at ahead of time."""

MAX_LOCAL_RANKS = 8
"""Ranks that may share a machine's cache; each fills its share of half of it."""

Positions = Mapping[int, tuple[int, int | None]]
"""For each slot its next draw, and the draw at which it ends (None: never)."""


class ReadAhead:
    """Keeps the cache ahead of the readers.

    Args:
        order: which sample each draw is; local sources are ignored. Its plan is copied, since the plan's caches are not
            thread-safe.
        num_ranks: ranks that read ahead, each for its own slots.
    """

    def __init__(self, order: SampleOrder, num_ranks: int) -> None:
        self._indexes = order.indexes
        self._plan = copy.deepcopy(order.plan)
        self._share = 2 * min(num_ranks, MAX_LOCAL_RANKS)
        self._positions: Positions = {}
        self._cursors: dict[int, int] = {}
        self._ahead: dict[tuple[int, str], tuple[int, int]] = {}
        """Tars that are cached or being copied, each with the last known draw (slot, n) that needs it."""
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def advance(self, positions: Positions) -> None:
        """Update the positions of the slots; returns at once."""
        if all(index.remote is None or index.tars.reads_parts for index in self._indexes):
            return
        self._positions = positions
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
            with unbound():
                self._thread.start()

    def close(self) -> None:
        """End the thread after the tar that is being copied."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while not self._closed and self._round():
                pass

    def _round(self) -> bool:
        """Look at one more draw of every slot; False where all are far enough ahead or the share is full."""
        moved = False
        for slot, (position, end) in self._positions.items():
            cursor = self._cursors.get(slot, position)
            if not position <= cursor <= position + AHEAD_DRAWS:
                cursor = position  # overtaken by the readers, or moved back by loading another state
            if cursor == position + AHEAD_DRAWS or (end is not None and cursor >= end):
                continue
            if not self._visit(slot, cursor):
                return False
            self._cursors[slot] = cursor + 1
            moved = True
        return moved

    def _visit(self, slot: int, n: int) -> bool:
        """Copy the tar of one draw if necessary; False where it does not fit yet."""
        source, sample = self._plan.locate(slot, n)
        index = self._indexes[source]
        if index.remote is None or index.tars.reads_parts:
            return True
        tar = (source, index.shard_of(sample))
        if tar not in self._ahead:
            if not self._fits(tar):
                return False
            with suppress(Exception):  # its reader tries again, and names it
                index.copy_shard(tar[1])
        self._ahead[tar] = (slot, n)
        return True

    def _fits(self, tar: tuple[int, str]) -> bool:
        """Whether a tar fits this rank's share together with those still needed; one tar is always allowed."""
        positions = self._positions
        self._ahead = {
            known: (slot, n)
            for known, (slot, n) in self._ahead.items()
            if slot in positions and n >= positions[slot][0]
        }
        source, shard = tar
        index = self._indexes[source]
        assert index.remote is not None
        held = sum(index.shard_bytes(name) for other, name in self._ahead if other == source)
        return held == 0 or held + index.shard_bytes(shard) <= index.remote.max_bytes // self._share
