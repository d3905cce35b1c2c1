"""Two models on the same samples: is one better, by how much, and what could this set have shown at all?

Owns: the paired statistics. Does not own files or which results may be compared (`tools.inspect.compare`). A paired
comparison is much sharper than one of two intervals: what is hard for both models cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.benchmarks.figures import Figure, Scored, Sum
from eval.benchmarks.resampling import Figures
from eval.bootstrap import Interval

Z_LEVEL = 1.959963984540054
"""95 %, both sides."""
Z_POWER = 0.8416212335729143
"""80 %."""


@dataclass(frozen=True)
class Comparison:
    """One figure under two models.

    `difference` is after - before with its interval over clusters. `num_better` and `num_worse` count samples whose
    score rose or fell. `p_value` is McNemar's, exact, where scores are 0 or 1, else that of the mean paired difference.
    `smallest_difference` is what the set would show with 80 % power at 5 %: a true difference below it mostly stays
    unseen. Standard errors are of the mean score.
    """

    metric: str
    before: float
    after: float
    difference: Interval
    num_samples: int
    num_clusters: int
    num_better: int
    num_worse: int
    paired_error: float
    unpaired_error: float
    test: str
    p_value: float
    smallest_difference: float


def compare(
    metric: str,
    configs: Sequence[Figure],
    sums: Sequence[Sum],
    before: Scored,
    after: Scored,
    *,
    clusters: Sequence[Hashable],
    seed: int = 0,
) -> Comparison:
    """Compare the figure `metric` of the same rows under two models."""
    both = Figures(configs, sums, before, clusters, after)
    values = [Figures(configs, sums, side, clusters).values()[metric] for side in (before, after)]
    assert values[0] is not None
    assert values[1] is not None
    differences = after.scores - before.scores
    num_better, num_worse = int((differences > 0).sum()), int((differences < 0).sum())
    paired = clustered_error(differences, clusters)
    is_right_or_wrong = bool(np.isin(np.concatenate([before.scores, after.scores]), (0.0, 1.0)).all())
    if is_right_or_wrong:
        test, p_value = "McNemar", mcnemar(num_better, num_worse)
    else:
        test, p_value = "paired z", _two_sided(float(differences.mean()), paired)
    return Comparison(
        metric=metric,
        before=values[0],
        after=values[1],
        difference=both.intervals(seed=seed)[metric],
        num_samples=len(differences),
        num_clusters=both.num_clusters,
        num_better=num_better,
        num_worse=num_worse,
        paired_error=paired,
        unpaired_error=math.hypot(*(clustered_error(side.scores, clusters) for side in (before, after))),
        test=test,
        p_value=p_value,
        smallest_difference=(Z_LEVEL + Z_POWER) * float(np.std(both.resampled(seed=seed)[metric])),
    )


def clustered_error(values: np.ndarray, clusters: Sequence[Hashable]) -> float:
    """The standard error of the mean of `values` [N] whose clusters were drawn, not they themselves."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([numbers[cluster] for cluster in clusters], dtype=np.int64)
    deviations = np.bincount(places, values - values.mean())
    return float(np.sqrt((deviations**2).sum())) / len(values)


def mcnemar(num_better: int, num_worse: int) -> float:
    """The exact two-sided p-value of McNemar's test: a fair coin for each sample that changed."""
    count, least = num_better + num_worse, min(num_better, num_worse)
    term, total = 1, 0
    for number in range(least + 1):
        total += term
        term = term * (count - number) // (number + 1)
    return min(1.0, float(2 * total / 2**count)) if count else 1.0


def _two_sided(mean: float, error: float) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / error / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979): below 0.05, the chance of any false find stays below it."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
