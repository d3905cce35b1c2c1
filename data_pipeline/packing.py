"""Samples of one slot -> rows of the batch.

Owns which samples share a row. Its state is the samples that wait in the pool, named by their draws; rows depend on the
order of draws alone, never on when a worker delivered them.
"""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.config import PadPacking, RowPacking
from data_pipeline.sample import Encoded, Row

DrawNext = Callable[[], Encoded | None]
"""The slot's next usable sample, or None once it has run out."""


class Packer:
    """Makes the rows of one slot."""

    def __init__(self, packing: PadPacking | RowPacking) -> None:
        self._packing = packing
        self.open: list[Encoded] = []
        """Samples drawn but not yet in a row, oldest first."""

    def next_row(self, draw_next: DrawNext) -> Row:
        """One row; empty when nothing is left."""
        if isinstance(self._packing, PadPacking):
            sample = self.open.pop(0) if self.open else draw_next()
            return (sample,) if sample is not None else ()
        return self._packed_row(self._packing, draw_next)

    def _packed_row(self, packing: RowPacking, draw_next: DrawNext) -> Row:
        """Best fit: the oldest sample opens the row, then the longest that still fits joins, until none does."""
        self._fill(packing.lookahead, draw_next)
        if not self.open:
            return ()
        row = [self.open.pop(0)]
        room = packing.row_tokens - row[0].num_tokens
        while True:
            self._fill(packing.lookahead, draw_next)
            fitting = [sample for sample in self.open if sample.num_tokens <= room]
            if not fitting:
                return tuple(row)
            best = max(fitting, key=lambda sample: sample.num_tokens)
            self.open.remove(best)
            row.append(best)
            room -= best.num_tokens

    def _fill(self, lookahead: int, draw_next: DrawNext) -> None:
        while len(self.open) < lookahead:
            sample = draw_next()
            if sample is None:
                return
            self.open.append(sample)
