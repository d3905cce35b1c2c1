"""Figures are functions of sums: beside arithmetic by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval.benchmarks.figures import AllOfUnit, Figure, Mean, Ratio, Scored, Sum, Total, YesNo
from eval.benchmarks.resampling import Figures
from eval.benchmarks.row import Row


def values(
    figure: Figure, fields: list[dict[str, Any]], scores: list[float], *sums: Sum, truths: list[Any] | None = None
) -> dict[str, float | None]:
    rows = [
        Row((str(place),), "?", truth, fields=each)
        for place, (each, truth) in enumerate(zip(fields, truths or [""] * len(fields), strict=True))
    ]
    said = np.array([float(score == (truth == "yes")) for score, truth in zip(scores, truths or scores, strict=True)])
    return Figures([figure], sums, Scored(rows, np.array(scores), said), range(len(rows))).values()


def test_means_by_group_and_over_some_rows_alone() -> None:
    fields = [{"kind": "a", "image": True}, {"kind": "a", "image": False}, {"kind": ["a", "b"], "image": True}]
    found = values(Mean(name="m", by=("kind",), scale=100, macro=True), fields, [1, 0, 0])
    assert found == {
        "m": pytest.approx(100 / 3),
        "m/a": pytest.approx(100 / 3),
        "m/b": 0,
        "m/mean": pytest.approx(50 / 3),
    }
    assert values(Mean(name="m", where="image"), fields, [1, 0, 0]) == {"m": 0.5}
    assert values(Mean(name="m", unless={"kind": "a", "image": False}), fields, [1, 1, 0]) == {"m": 0.5}
    assert values(Mean(name="m", where="nothing"), fields, [1, 1, 0]) == {"m": None}
    assert values(Total(name="t"), fields, [1, 0, 1]) == {"t": 2}


def test_all_of_a_unit_counts_units() -> None:
    fields = [{"index": number} for number in (7, 1000007, 8, 1000008, 2000008)]
    figure = AllOfUnit(name="c", unit=("index",), modulo=1000000)
    assert values(figure, fields, [1, 1, 1, 1, 0]) == {"c": 0.5}
    assert values(figure, fields, [1, 0, 1, 1, 1]) == {"c": 0.5}
    assert values(figure, fields, [0, 1, 1, 0, 1]) == {"c": 0}


def test_yes_and_no() -> None:
    truths = ["yes", "yes", "no", "no"]
    found = values(YesNo(by=("c",)), [{"c": "x"}] * 4, [1, 0, 0, 1], truths=truths)
    assert found["accuracy"] == found["precision"] == found["recall"] == found["f1"] == found["yes_share"] == 0.5
    assert found["f1/x"] == found["f1/mean"] == 0.5


def test_a_ratio_of_means_is_no_mean_of_ratios() -> None:
    figure = Ratio(name="r", scale=100)
    assert values(figure, [{}, {}], [8, 1], truths=[10, 2]) == {"r": pytest.approx(75)}
    assert values(Ratio(name="r", decimals=0), [{}, {}], [8, 1], truths=[10, 1]) == {"r": pytest.approx(4 / 6)}


def test_sums_need_all_their_parts() -> None:
    fields = [{"c": "a"}, {"c": "b"}]
    both = Sum(name="s", of=("m",), over=("a", "b"))
    missing = Sum(name="n", of=("m",), over=("a", "z"))
    each = Sum(name="e", of=("m", "m"), by_group=True)
    found = values(Mean(name="m", by=("c",)), fields, [1, 0], both, missing, each)
    assert found["s"] == 1
    assert "n" not in found
    assert (found["e/a"], found["e/b"]) == (2, 0)
