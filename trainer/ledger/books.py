"""Marks each draw under its outcome, and finds those that were marked twice or never.

enter(outcome, runs) ... --> sorted and joined, a million runs at a time --> bits --> draws, lost, repeated
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.ledger.blocks import Runs
from trainer.ledger.draw_set import Address, Bits, DrawSet, IntArray, SlotTable, runs_of

_RUNS_AT_ONCE = 1 << 20


class Books:
    """The outcomes of the draws of a table. `settle` before anything is asked for."""

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self._seen, self._twice = Bits(table.size), Bits(table.size)
        self._by_outcome: dict[str, Bits] = {}
        self._beyond: dict[str, list[Address]] = {}
        """Draws that were never drawn."""
        self._waiting: dict[str, list[Runs]] = {}
        self._num_waiting = 0

    def enter(self, outcome: str, runs: Runs) -> None:
        """Mark draws; those that are marked already count as repeated."""
        self._waiting.setdefault(outcome, []).append(runs)
        self._num_waiting += len(runs.slot)
        if self._num_waiting >= _RUNS_AT_ONCE:
            self.settle()

    def enter_draws(self, outcome: str, slot: IntArray, n: IntArray) -> None:
        """Mark draws one by one."""
        self.enter(outcome, Runs(slot, n, np.ones(len(slot), dtype=np.int64)))

    def enter_unseen(self, outcome: str, draws: Bits) -> None:
        """Mark those of a set that are not marked yet."""
        self.settle()
        draws.remove(self._seen)
        self._seen.add(draws)
        self._by_outcome[outcome] = draws

    def settle(self) -> None:
        """Mark what was entered."""
        waiting, self._waiting, self._num_waiting = self._waiting, {}, 0
        for outcome, entered in waiting.items():
            columns = (np.concatenate(list(column)) for column in zip(*map(_columns, entered), strict=True))
            first, length, beyond = self.table.split(Runs(*columns))
            self._beyond.setdefault(outcome, []).extend(beyond)
            self._mark(outcome, first, length)

    def draws(self, outcome: str) -> DrawSet:
        """Every draw with an outcome."""
        return DrawSet(self.table, self._by_outcome.get(outcome, Bits(0)), self._beyond.get(outcome, []))

    def lost(self) -> DrawSet:
        """Draws that were never marked."""
        if self._seen.count() == self.table.size:
            return DrawSet(self.table, Bits(0))
        return DrawSet(self.table, self._seen.complement())

    def repeated(self) -> DrawSet:
        """Draws that were marked more than once, or never drawn."""
        return DrawSet(self.table, self._twice, [address for each in self._beyond.values() for address in each])

    def _mark(self, outcome: str, first: IntArray, length: IntArray) -> None:
        order = np.argsort(first, kind="stable")
        first, length = first[order], length[order]
        if np.any(first[1:] < first[:-1] + length[:-1]):  # some draw comes twice among these
            ends = np.cumsum(length)
            within = np.arange(int(ends[-1])) - np.repeat(ends - length, length)
            numbers, counts = np.unique(np.repeat(first, length) + within, return_counts=True)
            self._twice.mark_numbers(numbers[counts > 1])
            first, length = runs_of(numbers)
        first, length = _joined(first, length)
        self._twice.mark_numbers(self._seen.mark(first, length))
        if outcome not in self._by_outcome:
            self._by_outcome[outcome] = Bits(self.table.size)
        self._by_outcome[outcome].mark(first, length)


def _columns(runs: Runs) -> Sequence[IntArray]:
    return runs.slot, runs.first, runs.length


def _joined(first: IntArray, length: IntArray) -> tuple[IntArray, IntArray]:
    """Runs in increasing order, those that touch made one."""
    begins = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1] + length[:-1]])[: len(first)])
    ends = np.concatenate([begins[1:] - 1, [len(first) - 1]])[: len(begins)]
    return first[begins], (first[ends] + length[ends] - first[begins])
