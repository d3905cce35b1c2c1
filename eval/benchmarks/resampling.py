"""Figures of a set of scores, and how much they would vary with other pictures of the same kind.

Whole clusters are drawn with replacement, as `eval.bootstrap` does for means. Clusters whose sums are equal in every
column cannot be told apart, so a resample is drawn as how many come from each kind of cluster: a multinomial draw,
whose time does not grow with the number of right and wrong answers. N rows, K kinds of clusters, S sums, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from eval.benchmarks.figures import Figure, Floats, Scored, Sum
from eval.bootstrap import LEVEL, NUM_RESAMPLES, Interval

_MAX_COUNTS_AT_ONCE = 4_000_000


class Figures:
    """The figures that `configs` and `sums` name, of scored rows; `clusters` [N] says which rows are drawn together.

    With `other`, scores of the same rows by another model: its figures minus these, both on the same draws.
    """

    def __init__(
        self,
        configs: Sequence[Figure],
        sums: Sequence[Sum],
        scored: Scored,
        clusters: Sequence[Hashable],
        other: Scored | None = None,
    ) -> None:
        self._configs, self._sums = configs, sums
        numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
        self.num_clusters = len(numbers)
        places_N = np.array([numbers[cluster] for cluster in clusters], dtype=np.int64)
        self._sides: list[list[dict[str, slice]]] = []
        columns: list[Floats] = []
        for side in [scored] if other is None else [scored, other]:
            self._sides.append([])
            for config in configs:
                parts: dict[str, slice] = {}
                for name, found in config.columns(side).items():
                    parts[name] = slice(len(columns), len(columns) + found.shape[1])
                    columns += [
                        np.bincount(places_N, column, self.num_clusters).astype(np.float64) for column in found.T
                    ]
                self._sides[-1].append(parts)
        self._kinds_KS, self._num_K = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)

    def _of(self, counts_RK: Floats) -> dict[str, Floats]:
        """The figures [R] of the first side; of the second one minus the first's, where there are two."""
        sums_RS = counts_RK @ self._kinds_KS
        sides = [self._of_side(sums_RS, slices) for slices in self._sides]
        if len(sides) == 1:
            return sides[0]
        return {name: sides[1][name] - values for name, values in sides[0].items() if name in sides[1]}

    def _of_side(self, sums_RS: Floats, slices: Sequence[dict[str, slice]]) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        for config, parts in zip(self._configs, slices, strict=True):
            found |= config.of({name: sums_RS[:, columns] for name, columns in parts.items()})
        for each in self._sums:
            found |= each.added(found)
        return found

    def values(self) -> dict[str, float | None]:
        """Each figure by name; None where nothing is there to divide by."""
        found = self._of(self._num_K[None].astype(np.float64))
        return {name: float(each[0]) if np.isfinite(each[0]) else None for name, each in found.items()}

    def resampled(self, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> dict[str, Floats]:
        """Each figure [R] of as many resamples; those without a value are left out."""
        generator, blocks = np.random.default_rng(seed), []
        at_once = max(1, _MAX_COUNTS_AT_ONCE // len(self._num_K))
        for start in range(0, num_resamples, at_once):
            size = min(at_once, num_resamples - start)
            counts_RK = generator.multinomial(self.num_clusters, self._num_K / self.num_clusters, size=size)
            blocks.append(self._of(counts_RK.astype(np.float64)))
        found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        return {name: values[np.isfinite(values)] for name, values in found.items()}

    def intervals(self, *, seed: int, num_resamples: int = NUM_RESAMPLES, level: float = LEVEL) -> dict[str, Interval]:
        """The percentile interval of each figure that has a value."""
        values = self.values()
        intervals = {}
        for name, resampled in self.resampled(seed=seed, num_resamples=num_resamples).items():
            value = values[name]
            if value is not None and len(resampled):
                low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
                intervals[name] = Interval(value, float(low), float(high), level, len(resampled))
        return intervals
