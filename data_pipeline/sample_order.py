"""The whole order of a stage's data, and the only place where a draw becomes a named sample.

Owns the resolution of draws and what makes two orders the same. Does not own the arithmetic (`order`, `mixture`) nor
the content of an index (`index`). Runs in the main process; workers receive its `SampleRef`s.

    (slot, n) --mixture, order--> (source, sample) --index--> SampleRef(slot, n, source, sample, shard, key)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.index import ShardIndex
from data_pipeline.mixture import Plan
from data_pipeline.order import IntArray
from data_pipeline.sample import SampleRef
from models.common.errors import InputError


class OrderIdentity(NamedTuple):
    """Equal for two orders exactly if the orders are equal; stored in a stream's state."""

    fingerprint: str
    """Of the samples, their mixture and the shuffle window; see `data_pipeline.build.order_fingerprint`."""
    seed: int
    num_slots: int

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> OrderIdentity:
        """The order that a stream's state belongs to."""
        return cls(*(state[name] for name in cls._fields))

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise InputError, with the reason, where a stream's state belongs to another order."""
        for name, value in self._asdict().items():
            if state.get(name) != value:
                raise InputError(
                    f"the stream's state has {name} {state.get(name)!r}, this run has {value!r}: the order of the data"
                    " would be another; use the same data, seed and global batch, or start anew"
                )


class SampleOrder:
    """Maps draw n of a slot to its sample. Pure: equal sources, seeds and numbers of slots give equal references."""

    def __init__(self, indexes: Sequence[ShardIndex], plan: Plan, identity: OrderIdentity) -> None:
        self.indexes = tuple(indexes)
        self.plan = plan
        self.identity = identity

    def resolve(self, slot: int, n: int) -> SampleRef:
        """The n-th draw of a slot. Looks into memory-mapped arrays, about 12 µs a draw; no tar is read."""
        source, sample = self.plan.locate(slot, n)
        index = self.indexes[source]
        return SampleRef(slot, n, source, sample, index.shard_of(sample), index.key_of(sample))

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(len(index) for index in self.indexes)

    def sample_numbers(self, slot: int, start: int, stop: int) -> IntArray:
        """The samples of draws [start, stop) of a slot, numbered over all sources one after the other."""
        sources, samples = self.plan.locate_all(slot, start, stop)
        firsts = np.cumsum([0, *(len(index) for index in self.indexes)])
        numbers: IntArray = samples + firsts[sources]
        return numbers

    def slot_length(self, slot: int) -> int:
        """Draws of one epoch in a slot."""
        return self.plan.slot_length(slot)

    def epoch_of(self, slot: int, n: int) -> int:
        """The epoch, from 0, that the n-th draw of a slot belongs to."""
        return n // max(1, self.slot_length(slot))

    @cached_property
    def epoch_samples(self) -> int:
        """Samples in one epoch of the whole global batch, all ranks' slots together."""
        return sum(self.slot_length(slot) for slot in range(self.identity.num_slots))
