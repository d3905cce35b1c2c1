"""Figures: what scores add up to, each with an interval over pictures.

    columns [N, C]  numbers of each row  --sum over rows-->  sums [C]  --of(sums)-->  figures by name

A figure is a function of SUMS over rows, also where it is no mean of rows (F1, all of a unit, a ratio of means). So one
bootstrap serves all (`eval.benchmarks.resampling`): sums are weighted by how often a row was drawn, and the same
function is applied to R resamples at once.

Owns: the kinds of figures. N rows, C columns, R resamples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from eval.benchmarks.fields import find
from eval.benchmarks.row import Row
from models.spec import Config

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Rows with what was scored: `scores` [N] from 0 to 1, and `said_yes` [N] where answers are yes or no."""

    rows: Sequence[Row]
    scores: Floats
    said_yes: Floats

    def field(self, name: str, place: int) -> Any:
        """A field of the row at `place`, named as in `eval.benchmarks.fields`; `picture` is its picture."""
        row = self.rows[place]
        return row.picture if name == "picture" else find(row.fields, name)


class FigureConfig(Config, ABC):
    """Fields of every figure; `by` gives one for each value of that field, called NAME/VALUE, beside the whole.

    `where` counts only rows in which that field is true, or has one of the values given; `unless` leaves out rows in
    which all fields have the values given.
    """

    name: str
    by: tuple[str, ...] = ()
    where: str | Mapping[str, Any] | None = None
    unless: Mapping[str, Any] | None = None
    scale: float = 1.0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The figures over all rows."""
        return (self.name,)

    def groups(self, scored: Scored) -> dict[str, npt.NDArray[np.bool_]]:
        """The rows [N] of each group by the group's figure's name; first the whole."""
        is_counted = np.array([self._counts(scored, place) for place in range(len(scored.rows))], dtype=bool)
        found = {self.name: is_counted}
        for field in self.by:
            values = [scored.field(field, place) for place in range(len(scored.rows))]
            lists = [value if isinstance(value, list | tuple) else [value] for value in values]
            for group in sorted({str(value) for value in _flat(lists) if value is not None}):
                is_in = np.array([group in map(str, value) for value in lists], dtype=bool)
                if (is_in & is_counted).any():
                    found[f"{self.name}/{group}"] = is_in & is_counted
        return found

    def _counts(self, scored: Scored, place: int) -> bool:
        if isinstance(self.where, str) and not scored.field(self.where, place):
            return False
        if isinstance(self.where, Mapping) and not _has(scored, place, self.where):
            return False
        return self.unless is None or not _has(scored, place, self.unless)

    @abstractmethod
    def columns(self, scored: Scored) -> dict[str, Floats]:
        """What is summed for each figure's name: [N, its number of columns]."""

    @abstractmethod
    def of(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """The figures [R] by name, of sums [R, columns]; not a number where nothing is there to divide by."""


def _flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for values in lists for value in values]


def _has(scored: Scored, place: int, wanted: Mapping[str, Any]) -> bool:
    return all(str(scored.field(field, place)) == str(value) for field, value in wanted.items())


class Mean(FigureConfig):
    """The mean of scores; with `macro`, also the mean of its groups as NAME/mean."""

    kind: Literal["mean"] = "mean"
    macro: bool = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        """With `macro` the mean of groups, too."""
        return (self.name, f"{self.name}/mean") if self.macro else (self.name,)

    def columns(self, scored: Scored) -> dict[str, Floats]:
        """Scores and ones."""
        return {name: np.stack([scored.scores * of, of], axis=1) for name, of in self.groups(scored).items()}

    def of(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """Sum by count."""
        found = {name: self.scale * _divided(each[:, 0], each[:, 1]) for name, each in sums.items()}
        return found | _macro(self.name, found) if self.macro else found


class Total(FigureConfig):
    """The sum of scores."""

    kind: Literal["total"] = "total"

    def columns(self, scored: Scored) -> dict[str, Floats]:
        """Scores."""
        return {name: (scored.scores * of)[:, None] for name, of in self.groups(scored).items()}

    def of(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """The sum."""
        return {name: self.scale * each[:, 0] for name, each in sums.items()}


class AllOfUnit(FigureConfig):
    """The share of units (rows alike in the fields `unit`) with every row right; a unit stands at its first row."""

    kind: Literal["all_of_unit"] = "all_of_unit"
    unit: tuple[str, ...]
    modulo: int | None = None
    """Of a numeric field: MMBench's question is the index modulo a million."""

    def columns(self, scored: Scored) -> dict[str, Floats]:
        """At the first row of each unit the product of its scores, and a one."""
        units = [self._unit_of(scored, place) for place in range(len(scored.rows))]
        found = {}
        for name, of in self.groups(scored).items():
            columns = np.zeros((len(units), 2))
            firsts: dict[tuple[Any, ...], int] = {}
            for place in np.flatnonzero(of):
                first = firsts.setdefault(units[place], int(place))
                columns[first] = (columns[first, 0] if first != place else 1.0) * scored.scores[place], 1.0
            found[name] = columns
        return found

    def _unit_of(self, scored: Scored, place: int) -> tuple[Any, ...]:
        values = [scored.field(field, place) for field in self.unit]
        return tuple(values) if self.modulo is None else tuple(int(value) % self.modulo for value in values)

    def of(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """Right units by units."""
        return {name: self.scale * _divided(each[:, 0], each[:, 1]) for name, each in sums.items()}


class YesNo(FigureConfig):
    """F1 (of yes), accuracy, precision, recall and share of yes, as NAME-less figures: f1, f1/GROUP and f1/mean."""

    kind: Literal["yes_no"] = "yes_no"
    name: str = "yes_no"

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The five, and with groups the mean of their F1."""
        return ("f1", "accuracy", "precision", "recall", "yes_share", *(("f1/mean",) if self.by else ()))

    def columns(self, scored: Scored) -> dict[str, Floats]:
        """True yes, said yes, is yes, right, ones."""
        is_yes = np.array([str(row.truth).strip().lower() == "yes" for row in scored.rows], dtype=np.float64)
        said = scored.said_yes
        every = np.stack([said * is_yes, said, is_yes, scored.scores, np.ones_like(said)], axis=1)
        return {name: every * of[:, None] for name, of in self.groups(scored).items()}

    def of(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """The five figures of every group, and the mean of the groups' F1."""
        found: dict[str, Floats] = {}
        for name, each in sums.items():
            true_yes, said, is_yes, right, count = each.T
            group = name.removeprefix(self.name)
            found[f"f1{group}"] = _divided(2 * true_yes, said + is_yes)
            found[f"accuracy{group}"] = _divided(right, count)
            found[f"precision{group}"] = _divided(true_yes, said)
            found[f"recall{group}"] = _divided(true_yes, is_yes)
            found[f"yes_share{group}"] = _divided(said, count)
        return found | _macro("f1", found)


class Ratio(FigureConfig):
    """A ratio of means: scores by truths, both numbers. `decimals` rounds both means first, as LLaVA-Bench does."""

    kind: Literal["ratio"] = "ratio"
    decimals: int | None = None

    def columns(self, scored: Scored) -> dict[str, Floats]:
        """Scores, truths and ones."""
        truths = np.array([float(row.truth) for row in scored.rows])
        every = np.stack([scored.scores, truths, np.ones_like(truths)], axis=1)
        return {name: every * of[:, None] for name, of in self.groups(scored).items()}

    def of(self, sums: Mapping[str, Floats]) -> dict[str, Floats]:
        """Mean by mean."""
        found = {}
        for name, each in sums.items():
            means = [_divided(each[:, column], each[:, 2]) for column in (0, 1)]
            if self.decimals is not None:
                means = [np.round(mean, self.decimals) for mean in means]
            found[name] = self.scale * _divided(*means)
        return found


Figure = Annotated[Mean | Total | AllOfUnit | YesNo | Ratio, Field(discriminator="kind")]


class Sum(Config):
    """A sum of other figures: of those named in `of`; with `over`, of OF/GROUP for each of these groups.

    With `by_group`, one for each group that all of them have: NAME/GROUP.
    """

    name: str
    of: tuple[str, ...]
    over: tuple[str, ...] = ()
    by_group: bool = False

    def added(self, figures: Mapping[str, Floats]) -> dict[str, Floats]:
        """The sums by name; none where a figure that it adds up is missing."""
        if self.by_group:
            first = self.of[0]
            groups = [name.removeprefix(first) for name in figures if name.startswith(f"{first}/")]
            parts = {f"{self.name}{group}": [f"{each}{group}" for each in self.of] for group in groups}
        else:
            parts = {self.name: [f"{each}/{group}" for each in self.of for group in self.over] or list(self.of)}
        return {
            name: np.sum([figures[each] for each in names], axis=0)
            for name, names in parts.items()
            if all(each in figures for each in names)
        }


def _divided(numerators: Floats, denominators: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(denominators > 0, numerators / denominators, np.nan)
    return found


def _macro(name: str, found: Mapping[str, Floats]) -> dict[str, Floats]:
    groups = [values for key, values in found.items() if key.startswith(f"{name}/")]
    return {f"{name}/mean": np.mean(groups, axis=0)} if groups else {}
