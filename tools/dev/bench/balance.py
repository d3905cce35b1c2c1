"""How long ranks wait for the most expensive one, computed from the costs of rows and micro-batches, not timed.

Owns the comparison of packings and of balancing (`trainer.flops.balancing`) over 8 ranks whose slots draw mixed
lengths. Ranks synchronize once per step (ZeRO-0 and 1), or in every micro-batch (ZeRO-2 and 3 reduce or gather there).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.config import GroupPacking, PackingConfig, PadPacking, RowPacking
from data_pipeline.packing import Packer
from tools.dev.bench.measure import row as line
from tools.dev.bench.pair import SHAPES, Length, make_samples, mixed_lengths, model_of, plan
from trainer.flops.balancing import balance, row_costs
from trainer.flops.language import needed_flops
from trainer.flops.shapes import model_shape

if TYPE_CHECKING:
    from data_pipeline.sample import Encoded, Row
    from tools.dev.bench.measure import Row as Line

RANKS, ROWS, MICRO_ROWS, STEPS = 8, 16, 4, 8
SHAPE = SHAPES["vicuna7b"]
PACKINGS: dict[str, PackingConfig] = {
    "a sample a row": PadPacking(),
    "grouped by length": GroupPacking(),
    "packed to 4096": RowPacking(row_tokens=4096),
}


def balance_rows() -> list[Line]:
    """The most expensive rank over the mean, with rows balanced by cost and in their order."""
    lines = []
    for name, packing in PACKINGS.items():
        dealt, as_they_come, once = waits(packing)
        title = f"most expensive rank over mean, {name}"
        lines += [
            line(f"{title}, met every micro-batch", "dealt, as they come", dealt, as_they_come, ["numpy"]),
            line(f"{title}, met once a step", "either way", once, once, ["numpy"]),
        ]
    return lines


def waits(packing: PackingConfig) -> tuple[float, float, float]:
    """Time over perfect balance: synchronized in every micro-batch, balanced and not; and once per step."""
    slots = [(Packer(packing, seed=0), _samples(slot)) for slot in range(RANKS * ROWS)]
    estimate = partial(needed_flops, model_shape(model_of(), SHAPE.find), plan("projector"))
    sums = np.zeros(4)
    for _ in range(STEPS):
        rows: list[Row] = [packer.next_row(lambda drawn=drawn: next(drawn)) for packer, drawn in slots]  # type: ignore[misc]
        costs_RB = np.reshape(row_costs(rows, estimate), (RANKS, ROWS))
        number = ROWS // MICRO_ROWS
        dealt_RM = np.array(
            [[costs_B[part].sum() for part in balance(costs_B.tolist(), MICRO_ROWS, number)] for costs_B in costs_RB]
        )
        plain_RM = costs_RB.reshape(RANKS, number, MICRO_ROWS).sum(2)
        totals_R = costs_RB.sum(1)
        sums += [dealt_RM.max(0).sum(), plain_RM.max(0).sum(), totals_R.max(), totals_R.mean()]
    dealt, as_they_come, once, even = sums
    return dealt / even, as_they_come / even, once / even


def _samples(slot: int) -> Iterator[Encoded]:
    """A slot's samples, without end; images have one pixel, since only their number affects the cost."""
    pixel, seed = np.zeros((1, 1, 3), np.uint8), slot
    while True:
        lengths: list[Length] = mixed_lengths(64, seed=seed)
        yield from make_samples(SHAPE, lengths, [pixel], seed=seed)
        seed += RANKS * ROWS
