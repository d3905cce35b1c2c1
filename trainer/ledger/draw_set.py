"""Sets of draws as bits, so that a billion of them take an eighth of a gigabyte; marked in runs.

slot 0: draws 0 ... next - 1 | slot 1: ... | ...      --SlotTable--> one number for each draw, a bit for each number
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from trainer.ledger.blocks import Runs

IntArray = NDArray[np.int64]
Address = tuple[int, int]
"""(slot, n) of a draw."""

_CHUNK_BYTES = 1 << 20
_MAX_NUMBERS = 1 << 22
_WITHIN = np.array([0xFF & (0xFF << place) for place in range(8)], dtype=np.uint8)
"""Bits from a place on, the lowest first."""
_ONES = np.array([place.bit_count() for place in range(256)], dtype=np.uint8)


class Bits:
    """A set of numbers in [0, size). Memory that is never marked is never taken from the system."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.words: NDArray[np.uint8] = np.zeros(-(-size // 8), dtype=np.uint8)

    def mark(self, first: IntArray, length: IntArray) -> IntArray:
        """Add runs of numbers.

        Args:
            first: [R], with `length`: runs that neither overlap nor are empty, in increasing order.

        Returns:
            Those numbers that were in the set already.
        """
        return np.concatenate([np.empty(0, np.int64), *(self._mark(*part) for part in _parts(first, length))])

    def _mark(self, first: IntArray, length: IntArray) -> IntArray:
        place, mask = _masks(first, length)
        # Two runs may end and begin in one byte; sorted as they are, such entries are neighbours.
        begins = np.flatnonzero(np.concatenate([[True], np.diff(place) != 0])[: len(place)])
        if len(begins) != len(place):
            place, mask = place[begins], np.bitwise_or.reduceat(mask, begins)
        before = self.words[place]
        twice = before & mask
        self.words[place] = before | mask
        return _numbers(place[twice != 0], twice[twice != 0]) if twice.any() else np.empty(0, np.int64)

    def mark_numbers(self, numbers: IntArray) -> IntArray:
        """Add numbers, in any order; returns those that were there already, and those that came more than once."""
        distinct, counts = np.unique(numbers, return_counts=True)
        return np.concatenate([distinct[counts > 1], self.mark(*runs_of(distinct))]) if len(numbers) else numbers

    def count(self) -> int:
        """How many numbers are in the set."""
        chunks = range(0, len(self.words), _CHUNK_BYTES)
        return sum(int(_ONES[self.words[low : low + _CHUNK_BYTES]].sum(dtype=np.int64)) for low in chunks)

    def span(self, low: int, high: int) -> NDArray[np.bool_]:
        """[high - low]: whether each number of a range is in the set."""
        if not len(self.words):
            return np.zeros(high - low, dtype=bool)
        unpacked = np.unpackbits(self.words[low // 8 : -(-high // 8)], bitorder="little")
        return unpacked[low % 8 : low % 8 + high - low].astype(bool)

    def __iter__(self) -> Iterator[int]:
        for low in range(0, len(self.words), _CHUNK_BYTES):
            words = self.words[low : low + _CHUNK_BYTES]
            held = np.flatnonzero(words)
            yield from _numbers(held + low, words[held]).tolist()

    def complement(self) -> Bits:
        """The numbers that are not in the set."""
        found = Bits(self.size)
        np.invert(self.words, out=found.words)
        if self.size % 8:
            found.words[-1] &= (1 << self.size % 8) - 1
        return found

    def add(self, other: Bits) -> None:
        """Add all numbers of another set."""
        for low in range(0, len(self.words), _CHUNK_BYTES):
            part = other.words[low : low + _CHUNK_BYTES]
            if part.any():
                self.words[low : low + _CHUNK_BYTES] |= part

    def remove(self, other: Bits) -> None:
        """Remove all numbers of another set."""
        for low in range(0, len(self.words), _CHUNK_BYTES):
            part = self.words[low : low + _CHUNK_BYTES]
            if part.any():
                part &= ~other.words[low : low + _CHUNK_BYTES]


def runs_of(numbers: IntArray) -> tuple[IntArray, IntArray]:
    """First number and length of each run in distinct, sorted numbers."""
    begins = np.flatnonzero(np.concatenate([[True], np.diff(numbers) != 1])[: len(numbers)])
    return numbers[begins], np.diff(np.concatenate([begins, [len(numbers)]]))


def _parts(first: IntArray, length: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """The same runs, cut and parted so that each part has about `_MAX_NUMBERS`: a part takes 3 bytes for each."""
    num_pieces = -(-length // _MAX_NUMBERS)
    if (num_pieces > 1).any():
        within = np.arange(int(num_pieces.sum())) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        first = np.repeat(first, num_pieces) + within * _MAX_NUMBERS
        length = np.minimum(np.repeat(length, num_pieces) - within * _MAX_NUMBERS, _MAX_NUMBERS)
    bounds = np.flatnonzero(np.diff(np.cumsum(length) // _MAX_NUMBERS)) + 1
    for low, high in zip([0, *bounds.tolist()], [*bounds.tolist(), len(first)], strict=True):
        if low < high:
            yield first[low:high], length[low:high]


def _masks(first: IntArray, length: IntArray) -> tuple[IntArray, NDArray[np.uint8]]:
    """The bytes that runs touch, in order, and what they set in each."""
    last = first + length - 1
    low, high = first >> 3, last >> 3
    num_bytes = high - low + 1
    ends = np.cumsum(num_bytes)
    place = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(low - (ends - num_bytes), num_bytes)
    mask = np.full(len(place), 0xFF, dtype=np.uint8)
    mask[ends - num_bytes] &= _WITHIN[first & 7]
    mask[ends - 1] &= ~(_WITHIN[last & 7] << 1).astype(np.uint8)
    return place, mask


def _numbers(place: IntArray, mask: NDArray[np.uint8]) -> IntArray:
    """The numbers whose bits are set in bytes."""
    which, bit = np.nonzero(np.unpackbits(mask[:, None], axis=1, bitorder="little"))
    return place[which] * 8 + bit


@dataclass(frozen=True)
class SlotTable:
    """The slots of a checkpoint's state, and the numbers of their draws."""

    slots: IntArray
    """Sorted."""
    next: IntArray
    """How many draws each has made."""
    base: IntArray
    """[slots + 1]: the number of each slot's draw 0; then how many draws there are."""

    @classmethod
    def of(cls, next_of: Mapping[int, int]) -> SlotTable:
        """The table of slots by their number of draws."""
        slots = np.array(sorted(next_of), dtype=np.int64)
        counts = np.array([next_of[slot] for slot in slots.tolist()], dtype=np.int64)
        return cls(slots, counts, np.concatenate([[0], np.cumsum(counts)]))

    @property
    def size(self) -> int:
        """How many draws all slots have made."""
        return int(self.base[-1])

    def split(self, runs: Runs) -> tuple[IntArray, IntArray, list[Address]]:
        """Runs of draws as runs of numbers, and those draws that were never drawn."""
        place = np.minimum(np.searchsorted(self.slots, runs.slot), max(0, len(self.slots) - 1))
        is_known = self.slots[place] == runs.slot if len(self.slots) else np.zeros(len(runs.slot), dtype=bool)
        limit = np.where(is_known, self.next[place] if len(self.slots) else 0, 0)
        kept = np.clip(limit - runs.first, 0, runs.length)
        beyond = [
            (slot, n)
            for slot, first, length, inside in zip(
                *(each[kept < runs.length].tolist() for each in (runs.slot, runs.first, runs.length, kept)), strict=True
            )
            for n in range(first + inside, first + length)
        ]
        held = kept > 0
        return (self.base[place] + runs.first)[held], kept[held], beyond

    def address(self, number: int) -> Address:
        """The draw of a number."""
        place = int(np.searchsorted(self.base, number, side="right")) - 1
        return int(self.slots[place]), number - int(self.base[place])


class DrawSet(Sequence[Address]):
    """The draws of a set of numbers, by slot and n."""

    def __init__(self, table: SlotTable, bits: Bits, further: Sequence[Address] = ()) -> None:
        self.table, self.bits, self._further = table, bits, further
        self._count = bits.count() + len(further)

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Address]:
        yield from (self.table.address(number) for number in self.bits)
        yield from self._further

    @overload
    def __getitem__(self, place: int) -> Address: ...
    @overload
    def __getitem__(self, place: slice) -> list[Address]: ...
    def __getitem__(self, place: int | slice) -> Address | list[Address]:
        if isinstance(place, int):
            return self[place : place + 1][0]
        found = []
        for number, address in enumerate(self):
            if place.stop is not None and number >= place.stop:
                break
            if number >= (place.start or 0):
                found.append(address)
        return found
