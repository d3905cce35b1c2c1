"""Compare evaluations sample by sample: `sightline compare A.json B.json ...`, each with the first.

Owns: which results may be compared, and the table. Results of different protocols are refused with the fact that
differs. The statistics are in `eval.paired`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import read_value
from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from eval.benchmarks.figures import Figure, Scored, Sum
    from eval.paired import Comparison

_IDS = {"vqa": ("question_id",), "yes_no": ("category", "question_id"), "caption": ("image_id",), "benchmark": ("id",)}
"""By task: the fields of a sample that identify it."""
_SCORES = {"vqa": ("vqa_accuracy", "accuracy", 100.0), "caption": ("CIDEr", "CIDEr", 1.0)}
"""By task: the metric, the field of a sample that it is the mean of, and the scale."""


@dataclass(frozen=True)
class Measured:
    """A result of an evaluation, with its samples by id."""

    path: Path
    result: Mapping[str, Any]
    samples: Mapping[tuple[str, ...], Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.result["name"])


@dataclass(frozen=True)
class Pair:
    """Two results of one protocol, and how they compare; `adjusted` is the p-value by Holm over all pairs."""

    before: Measured
    after: Measured
    comparison: Comparison
    adjusted: float

    def as_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        found = asdict(self.comparison)
        names = {"task": self.before.name, "before_file": str(self.before.path), "after_file": str(self.after.path)}
        return {**names, **found, "adjusted_p_value": self.adjusted}


def main(argv: list[str]) -> int:
    """Read, compare, print, and write the page."""
    arguments = _parser().parse_args(argv)
    pairs = compare_files(arguments.evaluations, seed=arguments.seed)
    print(table(pairs))
    if arguments.out is not None:
        from models.common.files import write_text

        write_text(arguments.out, json.dumps([pair.as_dict() for pair in pairs], indent=2) + "\n")
    if arguments.page is not None:
        from tools.inspect.compare_page import write_differences

        write_differences(arguments.page, pairs)
        print(f"written to {arguments.page}")
    return 0


def compare_files(paths: Sequence[Path], *, seed: int = 0) -> list[Pair]:
    """Each evaluation with the first, task by task.

    Raises:
        InputError: a file is missing, no task is in both, or two protocols or sets of samples differ.
    """
    from eval.paired import holm

    if len(paths) < 2:
        raise InputError("two evaluations at least are needed: sightline compare A.json B.json")
    first, *others = [read(path) for path in paths]
    found = []
    for path, other in zip(paths[1:], others, strict=True):
        shared = [name for name in first if name in other]
        if not shared:
            there = "; ".join(
                f"{file} has {', '.join(each) or 'none'}" for file, each in ((paths[0], first), (path, other))
            )
            raise InputError(f"no task whose samples have scores is in both: {there}")
        found += [(first[name], other[name], _compared(first[name], other[name], seed)) for name in shared]
    adjusted = holm([comparison.p_value for _, _, comparison in found])
    return [Pair(*each, adjusted=value) for each, value in zip(found, adjusted, strict=True)]


def read(path: Path) -> dict[str, Measured]:
    """The results of an evaluation by name, as far as their samples have scores; raises InputError."""
    from eval.results import read_samples

    found = {}
    try:
        for result in read_value(path)["results"]:
            if result["task"] not in _IDS or not result["metrics"]:
                continue
            samples = read_samples(path.with_name(result["samples"]))
            ids = [tuple(str(sample.get(name)) for name in _IDS[result["task"]]) for sample in samples]
            numbered = [
                (*each, str(ids[:place].count(each))) if len(set(ids)) < len(ids) else each
                for place, each in enumerate(ids)
            ]
            found[result["name"]] = Measured(path, result, dict(zip(numbered, samples, strict=True)))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no evaluation that eval.run or eval.score wrote") from None
    return found


def _compared(before: Measured, after: Measured, seed: int) -> Comparison:
    from eval.paired import compare

    if before.result["protocol"] != after.result["protocol"]:
        raise InputError(
            f"{before.name}: {before.path} and {after.path} were measured otherwise: "
            + difference(before.result["protocol_facts"], after.result["protocol_facts"])
        )
    for one, other in ((before, after), (after, before)):
        missing = [key for key in one.samples if key not in other.samples]
        if missing:
            raise InputError(f"{other.path} lacks {len(missing)} samples of {before.name}, the first {missing[0]}")
    metric, configs, sums, scored, clusters = _scored(before, [after.samples[key] for key in before.samples])
    return compare(metric, configs, sums, scored[0], scored[1], clusters=clusters, seed=seed)


def difference(one: Any, other: Any, where: str = "") -> str:
    """The first fact in which two protocols differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return difference(one.get(key), other.get(key), f"{where}.{key}" if where else str(key))
    return f"{where or 'the protocol'} is {json.dumps(one)[:80]} and {json.dumps(other)[:80]}"


def _scored(
    before: Measured, others: Sequence[Mapping[str, Any]]
) -> tuple[str, Sequence[Figure], Sequence[Sum], list[Scored], list[Hashable]]:
    """The figure that is compared, what makes it, both models' scores in one order, and the clusters."""
    import numpy as np

    from eval.benchmarks.figures import Mean, Scored
    from eval.benchmarks.row import Row
    from eval.benchmarks.rows import rows_of
    from eval.benchmarks.scoring import clusters_of
    from eval.benchmarks.spec import load

    sides, task = [list(before.samples.values()), list(others)], before.result["task"]
    if task == "benchmark" and "score" in sides[0][0]:
        benchmark = load(before.result["benchmark"])
        rows = rows_of(benchmark, [dict(sample["row"]) for sample in sides[0]], str(before.path), {}).rows
        both = [
            Scored(
                rows,
                np.array([float(sample["score"]) for sample in side]),
                np.array([float(sample["value"] == "yes") for sample in side]),
            )
            for side in sides
        ]
        return benchmark.headline, benchmark.figures, benchmark.sums, both, clusters_of(benchmark, rows)
    if task == "yes_no":
        metric, scale = "accuracy", 1.0
        scores = [[float(sample["counts_as"] == sample["label"]) for sample in side] for side in sides]
    else:
        metric, field, scale = _SCORES.get(task, _SCORES["caption"])
        if field not in sides[0][0]:
            raise InputError(
                f"{before.path}: the samples of {before.name} have no {field} each, so they do not compare"
            )
        scores = [[float(sample[field]) for sample in side] for side in sides]
    bare = [Row((str(place),), "", None) for place in range(len(sides[0]))]
    both = [Scored(bare, np.array(each), np.zeros(len(each))) for each in scores]
    return metric, [Mean(name=metric, scale=scale)], [], both, [sample["picture"] for sample in sides[0]]


def table(pairs: Sequence[Pair]) -> str:
    """A line for each pair."""
    header = ("task", "figure", "before", "after", "difference, 95 %", "better", "worse", "p", "p (Holm)", "could show")
    rows = [header]
    for pair in pairs:
        each = pair.comparison
        span = f"{each.difference.estimate:+.4g} [{each.difference.low:+.4g}, {each.difference.high:+.4g}]"
        numbers = (f"{each.before:.4f}", f"{each.after:.4f}", span, str(each.num_better), str(each.num_worse))
        ends = (f"{each.p_value:.3g}", f"{pair.adjusted:.3g}", f"{each.smallest_difference:.3g}")
        rows.append((pair.before.name, each.metric, *numbers, *ends))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{pair.before.name}: how these answers were asked is not known"
        for pair in pairs
        if pair.before.result["protocol_facts"].get("asked") == "elsewhere"
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *dict.fromkeys(notes)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sightline compare", description="Compare evaluations sample by sample, each with the first."
    )
    add = parser.add_argument
    add("evaluations", nargs="+", type=Path, metavar="OUT.json", help="of eval.run or eval.score")
    add("--page", type=Path, help="write a page of the samples on which they differ")
    add("--out", type=Path, help="write the comparison as JSON")
    add("--seed", type=int, default=0, help="of the intervals")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
