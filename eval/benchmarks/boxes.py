"""Parsers of boxes, and their overlap. A box is (left, top, right, bottom) in pixels of the picture.

The scale is the model's, so each is a parser of its own name: shares of the sides, thousandths (Qwen-VL), pixels, or
shares of the picture padded to a square (LLaVA).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.benchmarks.row import NOTHING, Parsed, Row
from models.common.errors import InputError

Box = tuple[float, float, float, float]

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")


def _first(answer: str) -> Box | None:
    found = _FOUR.search(answer) or _CORNERS.search(answer)
    if found is None:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    return left, top, right, bottom


def _scaled(answer: str, x_scale: float, y_scale: float, x_shift: float = 0.0, y_shift: float = 0.0) -> Parsed:
    box = _first(answer)
    if box is None:
        return NOTHING
    left, top, right, bottom = box
    value = (left * x_scale - x_shift, top * y_scale - y_shift, right * x_scale - x_shift, bottom * y_scale - y_shift)
    return Parsed(value, "exact" if _is_alone(answer) else "extracted")


def _is_alone(answer: str) -> bool:
    return bool(_FOUR.fullmatch(answer.strip()) or _CORNERS.fullmatch(answer.strip()))


def _sides(row: Row) -> tuple[float, float]:
    if row.fields.get("width") is None or row.fields.get("height") is None:
        raise InputError(f"question {row.name}: its picture's width and height are needed for a box of this scale")
    return float(row.fields["width"]), float(row.fields["height"])


def unit(answer: str, row: Row) -> Parsed:
    """Shares of width and height."""
    return _scaled(answer, *_sides(row))


def thousand(answer: str, row: Row) -> Parsed:
    """Thousandths of width and height."""
    width, height = _sides(row)
    return _scaled(answer, width / 1000, height / 1000)


def pixels(answer: str, _: Row) -> Parsed:
    """Pixels."""
    return _scaled(answer, 1.0, 1.0)


def padded_square(answer: str, row: Row) -> Parsed:
    """Shares of the longer side, where the shorter one was padded equally on both sides."""
    width, height = _sides(row)
    side = max(width, height)
    return _scaled(answer, side, side, (side - width) / 2, (side - height) / 2)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union; 0 where they do not meet or have no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0
