"""Which of a rank's rows are computed together: micro-batches of equal cost.

    this rank's rows --FLOPs of each--> the most expensive first, each to the cheapest micro-batch so far

That is the longest-processing-time rule (Graham 1969), with a limit on the rows of a micro-batch. Where ranks wait for
each other in every micro-batch (ZeRO-2 and 3 reduce or gather there), a step takes the sum over micro-batches of the
most expensive one among ranks. With micro-batches of equal cost it takes only as long as the most expensive rank. The
largest micro-batch, for which memory is sized, also shrinks. Rows stay with the rank that owns their slots: the order
decides which rows a rank has (`data_pipeline.order`), and packed rows already have similar lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_pipeline.sample import Row
from trainer.flops.counts import count_rows
from trainer.flops.estimator import FlopsEstimator


def row_costs(rows: Sequence[Row], estimate: FlopsEstimator | None) -> list[float]:
    """FLOPs of each row from its images, tokens and targets; its number of tokens where the shapes are not known."""
    counts = [count_rows([row]) for row in rows]
    if estimate is None:
        return [count.tokens for count in counts]
    return [sum(part.total for part in estimate(count).values()) for count in counts]


def balance(costs: Sequence[float], size: int, number: int) -> list[list[int]]:
    """The places of `costs` as `number` micro-batches of at most `size`, the most expensive micro-batch first.

    A pure function of the costs. Within a micro-batch rows keep their order; with one micro-batch, all do.
    """
    assert len(costs) <= size * number
    parts: list[list[int]] = [[] for _ in range(number)]
    sums = [0.0] * number
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        chosen = min((part for part in range(number) if len(parts[part]) < size), key=lambda part: sums[part])
        parts[chosen].append(place)
        sums[chosen] += costs[place]
    order = sorted(range(number), key=lambda part: -sums[part])
    return [sorted(parts[part]) for part in order]


def rows_of(rows: Sequence[Row], parts: Iterable[Sequence[int]]) -> list[list[Row]]:
    """The rows of each micro-batch; one without rows gets an empty row, which is computed as usual."""
    return [[rows[place] for place in part] or [()] for part in parts]


def in_order(parts: Sequence[Sequence[int]], values: Sequence[float]) -> list[float]:
    """Values of the rows of one micro-batch after another, in the order of the rows; filled-in rows are left out."""
    placed: dict[int, float] = {}
    start = 0
    for part in parts:
        placed.update(zip(part, values[start : start + len(part)], strict=True))
        start += max(1, len(part))
    return [placed[place] for place in range(len(placed))]
