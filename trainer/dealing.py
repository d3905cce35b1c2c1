"""Which of a rank's rows are computed together: micro-batches that cost alike.

    this rank's rows --cost of each--> dealt, dearest first, to the micro-batch with the least so far --> Dealt

Where ranks wait for each other in every micro-batch (ZeRO-2 and 3 reduce or gather there), a step takes the sum over
micro-batches of the dearest one among ranks; alike, they take that of the dearest rank once. The largest micro-batch,
which memory is sized for, shrinks too. Rows stay with the rank that owns their slots: what a rank holds is the order's
(`data_pipeline.order`), and packed rows are of like length already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_pipeline.sample import Row
from trainer.flops import count_rows
from trainer.needs import Needs


def row_costs(rows: Sequence[Row], needs: Needs | None) -> list[float]:
    """FLOPs that each row needs by its pictures, tokens and targets; its tokens where the shapes are not known."""
    counts = [count_rows([row]) for row in rows]
    if needs is None:
        return [count.tokens for count in counts]
    return [sum(part.total for part in needs(count).values()) for count in counts]


def deal(costs: Sequence[float], size: int, number: int) -> list[list[int]]:
    """The places of `costs` as `number` micro-batches of at most `size`, dearest micro-batch first.

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
    """The rows of each micro-batch; one without rows gets an empty row, which is computed like any other."""
    return [[rows[place] for place in part] or [()] for part in parts]


def in_order(parts: Sequence[Sequence[int]], values: Sequence[float]) -> list[float]:
    """Values of the rows of one micro-batch after another, in the order of the rows; filled-in rows are left out."""
    placed: dict[int, float] = {}
    start = 0
    for part in parts:
        placed.update(zip(part, values[start : start + len(part)], strict=True))
        start += max(1, len(part))
    return [placed[place] for place in range(len(placed))]
