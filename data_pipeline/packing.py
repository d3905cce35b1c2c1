"""Samples of one slot -> its rows of the global batch.

Owns which samples share a row, and which rows share a step. Its state is the samples that wait for a row, named by
their draws. Rows depend only on the order of draws, never on when a worker delivers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_pipeline.config import GroupPacking, PadPacking, RowPacking
from data_pipeline.order import permutation
from data_pipeline.sample import Encoded, Row

DrawNext = Callable[[], Encoded | None]
"""The slot's next usable sample, or None once it has run out."""

_GROUP = 5  # named random stream, distinct from those of `order`, `mixture` and `augment`


class Packer:
    """Makes the rows of one slot."""

    def __init__(self, packing: PadPacking | RowPacking | GroupPacking, seed: int = 0) -> None:
        self._packing = packing
        self._seed = seed
        self.waiting: list[Encoded] = []
        """Samples drawn but not yet in a row: the oldest first, or a group in the order in which rows take them."""
        self.num_packed = 0
        """Number of samples put into rows so far."""

    def next_row(self, draw_next: DrawNext) -> Row:
        """One row; empty when nothing is left."""
        if isinstance(self._packing, RowPacking):
            row = self._packed_row(self._packing, draw_next)
        else:
            if isinstance(self._packing, GroupPacking) and not self.waiting:
                self._draw_group(self._packing.lookahead, draw_next)
            sample = self.waiting.pop(0) if self.waiting else draw_next()
            row = (sample,) if sample is not None else ()
        self.num_packed += len(row)
        return row

    def _draw_group(self, lookahead: int, draw_next: DrawNext) -> None:
        """Take the next samples, sort them by length, and arrange them in the order that all slots share.

        The sample of a given rank among `lookahead` is of similar length in all slots, and all slots give the same rank
        to the same step without communication: the order of ranks is a function of the seed and the group's number.
        """
        self._fill(lookahead, draw_next)
        by_length = sorted(self.waiting, key=lambda sample: (sample.num_tokens, sample.ref.n))
        ranks = permutation(lookahead, self._seed, _GROUP, -(-self.num_packed // lookahead)).tolist()
        self.waiting = [by_length[rank] for rank in ranks if rank < len(by_length)]

    def _packed_row(self, packing: RowPacking, draw_next: DrawNext) -> Row:
        """The oldest sample first, then the others in order while all fit; at last the set that fills the row best."""
        row: list[Encoded] = []
        room = packing.row_tokens
        while True:
            self._fill(packing.lookahead, draw_next)
            if not self.waiting:
                return tuple(row)
            fits_whole = sum(sample.num_tokens for sample in self.waiting) <= room
            if row and not fits_whole:
                break
            row.append(self.waiting.pop(0))
            room -= row[-1].num_tokens
        chosen = best_filling([sample.num_tokens for sample in self.waiting], room)
        row += [self.waiting[place] for place in chosen]
        self.waiting = [sample for place, sample in enumerate(self.waiting) if place not in chosen]
        return tuple(row)

    def _fill(self, lookahead: int, draw_next: DrawNext) -> None:
        while len(self.waiting) < lookahead:
            sample = draw_next()
            if sample is None:
                return
            self.waiting.append(sample)


def best_filling(lengths: Sequence[int], room: int) -> list[int]:
    """Indices of the lengths whose sum is nearest to `room` without exceeding it; ties go to earlier ones.

    Subset sum over bits: bit s of `reachable[i]` is set if some of the first i lengths sum to s. With 32 lengths and
    4,096 tokens this takes some ten microseconds.
    """
    inside = (1 << (room + 1)) - 1
    reachable = [1]
    for length in lengths:
        reachable.append(reachable[-1] | (reachable[-1] << length) & inside)
    total = reachable[-1].bit_length() - 1
    chosen: list[int] = []
    for place in reversed(range(len(lengths))):
        if not reachable[place] >> total & 1:
            chosen.append(place)
            total -= lengths[place]
    return chosen[::-1]
