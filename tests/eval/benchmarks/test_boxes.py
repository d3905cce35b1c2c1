"""Boxes on four scales, and their overlap."""

from __future__ import annotations

import pytest

from eval.benchmarks import boxes
from eval.benchmarks.rules import iou
from tests.eval.benchmarks.rows import row

WIDE = row([40, 10, 20, 10], width=100, height=50)


@pytest.mark.parametrize(
    ("parse", "answer"),
    [
        (boxes.unit, "[0.4, 0.2, 0.6, 0.4]"),
        (boxes.thousand, "<box>(400,200),(600,400)</box>"),
        (boxes.pixels, "It is at [40, 10, 60, 20]."),
        (boxes.padded_square, "[0.4, 0.35, 0.6, 0.45]"),
    ],
)
def test_one_box_on_every_scale(parse: object, answer: str) -> None:
    assert parse(answer, WIDE).value == pytest.approx((40, 10, 60, 20))  # type: ignore[operator]


def test_half_of_the_union_is_enough_and_swapped_corners_are_not() -> None:
    assert iou((40, 10, 60, 20), WIDE) == 1.0
    assert iou((40, 10, 50, 20), WIDE) == 1.0
    assert iou((40, 10, 49, 20), WIDE) == 0.0
    assert iou((60, 20, 40, 10), WIDE) == 0.0
    assert boxes.unit("no box", WIDE).value is None
