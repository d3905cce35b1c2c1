"""Intervals over pictures: beside a bootstrap that draws row by row, and where it must have no width."""

from __future__ import annotations

import numpy as np
import pytest

from eval.benchmarks.figures import AllOfUnit, Mean, Scored, YesNo
from eval.benchmarks.resampling import Figures
from eval.benchmarks.row import Row
from eval.bootstrap import mean_interval


def scored(scores: list[float], truths: list[str] | None = None) -> Scored:
    rows = [Row((str(place),), "?", truth) for place, truth in enumerate(truths or ["yes"] * len(scores))]
    said = np.array([float(score == (row.truth == "yes")) for score, row in zip(scores, rows, strict=True)])
    return Scored(rows, np.array(scores, dtype=np.float64), said)


def test_a_mean_has_the_interval_of_drawing_clusters_one_by_one() -> None:
    generator = np.random.default_rng(3)
    scores = [float(score) for score in generator.random(300) < 0.4]
    clusters = [place // 3 for place in range(300)]
    found = Figures([Mean(name="m")], [], scored(scores), clusters).intervals(seed=0)["m"]
    other = mean_interval(scores, clusters=clusters, seed=1)
    assert found.estimate == pytest.approx(other.estimate)
    # Quantiles of 2,000 resamples vary by about a twentieth of the interval's half width.
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.2 * (other.high - other.estimate))


def test_questions_of_one_picture_widen_the_interval() -> None:
    scores = [float(place % 20 < 10) for place in range(200)]
    alone = Figures([Mean(name="m")], [], scored(scores), range(200)).intervals(seed=0)["m"]
    together = Figures([Mean(name="m")], [], scored(scores), [place // 10 for place in range(200)])
    wide = together.intervals(seed=0)["m"]
    assert wide.high - wide.low > 2 * (alone.high - alone.low)


def test_f1_and_units_are_resampled_as_what_they_are() -> None:
    figures = [YesNo(), AllOfUnit(name="u", unit=("picture",))]
    right = Figures(figures, [], scored([1.0] * 40, ["yes", "no"] * 20), [place // 2 for place in range(40)])
    found = right.intervals(seed=0)
    assert (found["f1"].low, found["f1"].high) == (1.0, 1.0)
    assert (found["accuracy"].low, found["accuracy"].high) == (1.0, 1.0)
    again = right.intervals(seed=0)
    assert found == again
