"""Rules: how right a parsed answer is, from 0 to 1, beside the truth of its row.

Owns the table of rules and the short ones. A value of None never reaches a rule: it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from eval import vqa
from eval.benchmarks import boxes, mmmu
from eval.benchmarks.distance import edit_distance
from eval.benchmarks.fields import find
from eval.benchmarks.row import Row

Rule = Callable[[Any, Row], float]

RELAXED_SHARE = 0.05
MIN_ANLS = 0.5
MIN_IOU = 0.5


def truths(row: Row) -> list[str]:
    """The right answers as texts, one or several."""
    found = row.truth if isinstance(row.truth, list | tuple) else [row.truth]
    return [str(each) for each in found]


def equal(value: Any, row: Row) -> float:
    """1 where the value is the truth, in either case and without blanks around."""
    return float(str(value).strip().lower() in [truth.strip().lower() for truth in truths(row)])


def equal_exactly(value: Any, row: Row) -> float:
    """1 where the value is the truth, letter by letter."""
    return float(str(value) in truths(row))


def _vqa(normalisation: vqa.Normalisation) -> Rule:
    def accuracy(value: str, row: Row) -> float:
        return vqa.answer_accuracy(value, truths(row), normalisation)

    return accuracy


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(value: str, row: Row) -> float:
    """ChartQA's: within 5 % of a number that is not 0, else equal in either case.

    vis-nlp/ChartQA and lmms-eval. Years pass where they are wrong by less than 5 %.
    """
    truth = truths(row)[0]
    found, right = _number(value), _number(truth)
    if found is not None and right:
        return float(abs(found - right) / abs(right) <= RELAXED_SHARE)
    return float(value.lower() == truth.lower())


def anls(value: str, row: Row) -> float:
    """DocVQA's similarity: 1 - distance / longest RAW length, best over the truths; below 0.5 it is 0.

    Texts are compared in lower case with single blanks. Dividing by their lengths instead costs half a point.
    """
    return max((_similarity(value, truth) for truth in truths(row)), default=0.0)


def _similarity(value: str, truth: str) -> float:
    one, other = " ".join(truth.strip().lower().split()), " ".join(value.strip().lower().split())
    longest = max(len(truth.upper()), len(value.upper()))
    if abs(len(one) - len(other)) > longest * MIN_ANLS:
        return 0.0
    similarity = 1 - edit_distance(one, other) / longest if longest else 1.0
    return similarity if similarity >= MIN_ANLS else 0.0


def contains(value: str, row: Row) -> float:
    """OCRBench's: a truth stands in the answer, in lower case; for HME100k without blanks and as it is written."""
    if str(find(row.fields, "dataset_name|dataset")).startswith("HME100k"):
        squeezed = value.strip().replace("\n", " ").replace(" ", "")
        return float(any(truth.strip().replace("\n", " ").replace(" ", "") in squeezed for truth in truths(row)))
    text = value.lower().strip().replace("\n", " ")
    return float(any(truth.lower().strip().replace("\n", " ") in text for truth in truths(row)))


def iou(value: Sequence[float], row: Row) -> float:
    """1 where the boxes overlap by half of their union or more; the truth is (left, top, width, height) in pixels."""
    left, top, width, height = (float(number) for number in row.truth)
    return float(boxes.overlap(value, (left, top, left + width, top + height)) >= MIN_IOU)


def verdict(value: float, _: Row) -> float:
    """The judge's number itself."""
    return value if math.isfinite(value) else 0.0


RULES: dict[str, Rule] = {
    "equal": equal,
    "equal_exactly": equal_exactly,
    "vqa.official": _vqa("official"),
    "vqa.evalai": _vqa("evalai"),
    "relaxed": relaxed,
    "anls": anls,
    "contains": contains,
    "mmmu_open": mmmu.open_rule,
    "iou": iou,
    "verdict": verdict,
}
