"""Bootstrap intervals: how much a score would vary with other samples of the same kind.

Owns: seeded percentile intervals of a mean, of a ratio of sums, and of differences between two runs. Does not own
what is measured. Samples that belong together (questions about one image) are drawn together: give their
`clusters`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
NUM_RESAMPLES = 2000
_MAX_DRAWS_AT_ONCE = 4_000_000
"""Bounds the memory of one block of resamples (32 MB of indices)."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval around `estimate`, which is the value on the samples as they are."""

    estimate: float
    low: float
    high: float
    level: float
    num_resamples: int

    def as_dict(self) -> dict[str, float]:
        """The interval as a JSON object, one entry per field."""
        return asdict(self)


def _cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Per cluster: the sum of its values and how many there are. Without clusters each value is its own."""
    values_n = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return values_n, np.ones_like(values_n)
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([numbers[cluster] for cluster in clusters], dtype=np.int64)
    if len(places) != len(values_n):
        raise ValueError(f"{len(values_n)} values but {len(places)} clusters")
    sums_n = np.bincount(places, weights=values_n).astype(np.float64)
    return sums_n, np.bincount(places).astype(np.float64)


def _resampled_ratios(
    numerators: Floats, denominators: Floats, num_resamples: int, generator: np.random.Generator
) -> Floats:
    """`num_resamples` values of sum(numerators) / sum(denominators) over rows drawn with replacement."""
    num_rows = len(numerators)
    if num_rows == 0:
        raise ValueError("no samples to resample")
    block = max(1, _MAX_DRAWS_AT_ONCE // num_rows)
    ratios = []
    for start in range(0, num_resamples, block):
        rows = generator.integers(0, num_rows, size=(min(block, num_resamples - start), num_rows))
        ratios.append(numerators[rows].sum(axis=1) / denominators[rows].sum(axis=1))
    return np.concatenate(ratios)


def _interval(estimate: float, resampled: Floats, level: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high), level, len(resampled))


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), such as a loss per token; row i is one sample."""
    tops, bottoms = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if tops.shape != bottoms.shape:
        raise ValueError(f"{len(tops)} numerators but {len(bottoms)} denominators")
    resampled = _resampled_ratios(tops, bottoms, num_resamples, np.random.default_rng(seed))
    return _interval(tops.sum() / bottoms.sum(), resampled, level)


def mean_interval(
    values: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Interval of the mean of `values`; whole clusters are drawn where `clusters` names each value's."""
    sums, counts = _cluster_sums(values, clusters)
    return ratio_interval(list(sums), list(counts), seed=seed, level=level, num_resamples=num_resamples)


def paired_interval(
    after: Sequence[float],
    before: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Interval of mean(after) - mean(before) where row i of both is the same sample under two models."""
    if len(after) != len(before):
        raise ValueError(f"paired samples differ in number: {len(after)} and {len(before)}")
    differences = [late - early for late, early in zip(after, before, strict=True)]
    return mean_interval(differences, clusters=clusters, seed=seed, level=level, num_resamples=num_resamples)


def unpaired_interval(
    after: Sequence[float],
    before: Sequence[float],
    *,
    after_clusters: Sequence[Hashable] | None = None,
    before_clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Interval of mean(after) - mean(before) where the two were measured on different samples."""
    late_seed, early_seed = np.random.default_rng(seed).spawn(2)
    late = _resampled_ratios(*_cluster_sums(after, after_clusters), num_resamples, late_seed)
    early = _resampled_ratios(*_cluster_sums(before, before_clusters), num_resamples, early_seed)
    estimate = float(np.mean(after) - np.mean(before))
    return _interval(estimate, late - early, level)
