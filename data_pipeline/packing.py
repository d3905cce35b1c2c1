"""Samples of one slot -> rows of the batch.

Owns which samples share a row, and which rows share a step. Its state is the samples that wait in the pool, named by
their draws; rows depend on the order of draws alone, never on when a worker delivered them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_pipeline.config import GroupPacking, PadPacking, RowPacking
from data_pipeline.order import permutation
from data_pipeline.sample import Encoded, Row

DrawNext = Callable[[], Encoded | None]
"""The slot's next usable sample, or None once it has run out."""

_GROUP = 5  # named random stream, beside those of `order`, `mixture` and `augment`


class Packer:
    """Makes the rows of one slot."""

    def __init__(self, packing: PadPacking | RowPacking | GroupPacking, seed: int = 0) -> None:
        self._packing = packing
        self._seed = seed
        self.open: list[Encoded] = []
        """Samples drawn but not yet in a row: oldest first, or in a group in the order in which they will leave."""
        self.num_left = 0
        """Samples that have left in rows."""

    def next_row(self, draw_next: DrawNext) -> Row:
        """One row; empty when nothing is left."""
        if isinstance(self._packing, RowPacking):
            row = self._packed_row(self._packing, draw_next)
        else:
            if isinstance(self._packing, GroupPacking) and not self.open:
                self._open_group(self._packing.lookahead, draw_next)
            sample = self.open.pop(0) if self.open else draw_next()
            row = (sample,) if sample is not None else ()
        self.num_left += len(row)
        return row

    def _open_group(self, lookahead: int, draw_next: DrawNext) -> None:
        """Take the next samples, sort them by length, and put them into the order that all slots share.

        Samples of one rank among `lookahead` are of like length in all slots, and all slots let the same rank go at the
        same step, without knowing of each other: the order of ranks is a function of the seed and the group's number.
        """
        self._fill(lookahead, draw_next)
        by_length = sorted(self.open, key=lambda sample: (sample.num_tokens, sample.draw.n))
        ranks = permutation(lookahead, self._seed, _GROUP, -(-self.num_left // lookahead)).tolist()
        self.open = [by_length[rank] for rank in ranks if rank < len(by_length)]

    def _packed_row(self, packing: RowPacking, draw_next: DrawNext) -> Row:
        """The oldest opens the row; while all that wait fit, they follow in order; then comes the best last filling."""
        row: list[Encoded] = []
        room = packing.row_tokens
        while True:
            self._fill(packing.lookahead, draw_next)
            if not self.open:
                return tuple(row)
            fits_whole = sum(sample.num_tokens for sample in self.open) <= room
            if row and not fits_whole:
                break
            row.append(self.open.pop(0))
            room -= row[-1].num_tokens
        chosen = best_filling([sample.num_tokens for sample in self.open], room)
        row += [self.open[place] for place in chosen]
        self.open = [sample for place, sample in enumerate(self.open) if place not in chosen]
        return tuple(row)

    def _fill(self, lookahead: int, draw_next: DrawNext) -> None:
        while len(self.open) < lookahead:
            sample = draw_next()
            if sample is None:
                return
            self.open.append(sample)


def best_filling(lengths: Sequence[int], room: int) -> list[int]:
    """Places of those lengths whose sum comes nearest to `room` without passing it; the earlier ones where sums tie.

    Subset sum over bits: bit s of `reachable[i]` says that some of the first i lengths sum to s. With 32 lengths and
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
