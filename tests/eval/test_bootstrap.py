"""Bootstrap intervals: what they must equal, and whether they cover."""

from __future__ import annotations

import numpy as np
import pytest

from eval.bootstrap import mean_interval, paired_interval, ratio_interval, unpaired_interval


def test_same_seed_same_interval_and_another_seed_another() -> None:
    values = list(np.random.default_rng(1).normal(size=200))
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(10.0, 2.0, size=1000)
    interval = mean_interval(list(values), num_resamples=4000)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.estimate == pytest.approx(values.mean())
    # 4000 resamples leave about 2 % of noise on a 2.5 % quantile
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.06)


def test_samples_in_clusters_are_drawn_together() -> None:
    """Ten copies of each value tell no more than the values alone do."""
    values = list(np.random.default_rng(2).normal(size=100))
    copies = [value for value in values for _ in range(10)]
    clusters = [number for number in range(100) for _ in range(10)]
    alone, clustered, naive = mean_interval(values), mean_interval(copies, clusters=clusters), mean_interval(copies)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_ratio_with_equal_denominators_is_a_mean() -> None:
    values = list(np.random.default_rng(5).normal(size=50))
    ratio, mean = ratio_interval([2 * value for value in values], [2.0] * 50), mean_interval(values)
    assert (ratio.low, ratio.high) == pytest.approx((mean.low, mean.high))


def test_pairing_removes_what_both_runs_share() -> None:
    generator = np.random.default_rng(3)
    hardness = generator.normal(0, 5, size=400)
    before = list(hardness)
    after = list(hardness + generator.normal(0.5, 0.5, size=400))
    paired, unpaired = paired_interval(after, before), unpaired_interval(after, before)
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert paired.low > 0 > unpaired.low


def test_blocks_of_resamples_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(4).normal(size=64))
    whole = mean_interval(values)
    monkeypatch.setattr("eval.bootstrap._MAX_DRAWS_AT_ONCE", 64 * 7)
    assert mean_interval(values) == whole


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no samples"):
        mean_interval([])
