"""Splits a rank's rows of a global batch into micro-batches and copies them to its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from data_pipeline.batch import Batch
from data_pipeline.feed import feed
from data_pipeline.sample import Row
from models.spec import TextSpec
from trainer.flops.balancing import balance, in_order, row_costs, rows_of
from trainer.flops.estimator import FlopsEstimator


@dataclass(frozen=True)
class MicroBatching:
    """How rows become micro-batches: at most `micro_rows` each, `number` of them on every rank, of equal cost."""

    text: TextSpec
    device: torch.device
    micro_rows: int
    number: int
    estimator: FlopsEstimator | None
    """The cost of a row; None: its number of tokens."""

    def split(self, rows: Sequence[Row]) -> MicroBatches:
        """The micro-batches of this rank's rows, the most expensive first."""
        parts = balance(row_costs(rows, self.estimator), self.micro_rows, self.number)
        return MicroBatches(self, rows, parts)

    def one(self, rows: Sequence[Row]) -> Batch:
        """The first micro-batch of `rows` in their order."""
        return next(iter(feed([list(rows[: self.micro_rows])], self.text, self.device)))


@dataclass(frozen=True)
class MicroBatches:
    """One rank's micro-batches of a step; iterating copies each to the device while the previous one computes."""

    batching: MicroBatching
    rows: Sequence[Row]
    parts: Sequence[Sequence[int]]
    """The indices in `rows` of each micro-batch's rows."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(feed(rows_of(self.rows, self.parts), self.batching.text, self.batching.device))

    def in_order(self, values: Sequence[float]) -> list[float]:
        """Values of the rows of one micro-batch after another, in the order of `rows`."""
        return in_order(self.parts, values)
