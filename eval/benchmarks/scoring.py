"""Answers to a benchmark's questions -> its figures. Needs no model, and no torch.

Owns: which parser and rule each row has, what is drawn together in the bootstrap, chance, the share of answers that
could not be read, and what a result's protocol is made of.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.benchmarks.fields import find
from eval.benchmarks.figures import Scored
from eval.benchmarks.parsers import Parser, make_parser
from eval.benchmarks.resampling import Figures
from eval.benchmarks.row import Parsed, Row
from eval.benchmarks.rows import Rows
from eval.benchmarks.rules import RULES
from eval.benchmarks.spec import SUFFIXES, Benchmark
from eval.benchmarks.tables import Base64Picture, ParquetPicture
from eval.bootstrap import Interval, mean_interval
from eval.result import TaskResult


def score_answers(
    name: str,
    benchmark: Benchmark,
    rows: Rows,
    answers: Sequence[str],
    *,
    asked: Mapping[str, Any] | None,
    result_name: str | None = None,
    shuffled: bool = False,
    seed: int = 0,
    shown: Sequence[str | None] | None = None,
    is_published: bool = False,
) -> TaskResult:
    """The result of one answer to every row.

    Args:
        name: the benchmark's.
        asked: how the questions were asked, None where that is unknown.
        shown: the pictures that were shown, where they are not the rows' own.
        is_published: whether all was asked as for the published figures, which then stand beside.
    """
    outcome = _captions if benchmark.form.rule == "captions" else _figures
    if benchmark.is_judged and asked is not None and "judge" not in asked:
        outcome = _unjudged
    metrics, intervals, details, samples = outcome(benchmark, rows.rows, answers, seed)
    details |= {"benchmark": name, "headline": benchmark.headline, "num_repeated": rows.num_repeated}
    if is_published:
        details["published"] = [each.model_dump() for each in benchmark.published]
    pictures = [picture_name(row) for row in rows.rows]
    lines = [
        {"id": row.name, "picture": picture, "shown": other, "question": row.question, "answer": answer, **sample}
        for row, picture, other, answer, sample in zip(
            rows.rows, pictures, shown or pictures, answers, samples, strict=True
        )
    ]
    return TaskResult(
        task="benchmark",
        name=result_name or name,
        metrics=metrics,
        intervals=intervals,
        facts=_facts(name, benchmark, rows, asked),
        shuffled=shuffled,
        samples=lines,
        details=details,
    )


def _facts(name: str, benchmark: Benchmark, rows: Rows, asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """What must be equal in a comparison: how it was asked, how it was scored, on which files."""
    forms = {"": benchmark.form, **benchmark.variants}
    return {
        "benchmark": name,
        "version": benchmark.version,
        "asked": "elsewhere" if asked is None else dict(asked),
        "parse": {key: form.parse for key, form in forms.items()},
        "rule": {key: form.rule for key, form in forms.items()},
        "figures": [figure.model_dump(mode="json") for figure in (*benchmark.figures, *benchmark.sums)],
        "split": dict(rows.digests),
        "num_samples": len(rows.rows),
    }


def asked_facts(benchmark: Benchmark, max_new_tokens: int) -> dict[str, Any]:
    """How the questions are asked: part of the protocol."""
    forms = {"": benchmark.form, **benchmark.variants}
    prompts = {
        key: {
            "ask": form.ask,
            "replace": dict(form.replace),
            "options": form.options,
            "suffix": SUFFIXES[form.suffix],
        }
        for key, form in forms.items()
    }
    return {"prompt": prompts, "decoding": {"max_new_tokens": max_new_tokens, "temperature": 0.0, "num_beams": 1}}


_Outcome = tuple[dict[str, float | None], dict[str, Interval], dict[str, Any], list[dict[str, Any]]]


def _figures(benchmark: Benchmark, rows: Sequence[Row], answers: Sequence[str], seed: int) -> _Outcome:
    parsed, scores = scored_rows(benchmark, rows, answers)
    clusters = clusters_of(benchmark, rows)
    said = np.array([float(each.value == "yes") for each in parsed])
    figures = Figures(benchmark.figures, benchmark.sums, Scored(rows, np.array(scores), said), clusters)
    values, intervals = figures.values(), figures.intervals(seed=seed)
    metrics = {name: values.get(name) for name in benchmark.metric_names}
    groups = {name: value for name, value in values.items() if name not in metrics}
    details: dict[str, Any] = {
        "groups": groups,
        "group_intervals": {name: intervals[name].as_dict() for name in groups if name in intervals},
        "unparsed": sum(each.how == "none" for each in parsed) / len(parsed),
        "chance": _chance(benchmark, rows, clusters),
        "num_clusters": len(set(clusters)),
        "unavailable": {name: "no row of it among these" for name, value in metrics.items() if value is None},
    }
    chance = None if details["chance"] is None else details["chance"][benchmark.headline]
    details["note"] = f"{details['unparsed']:.1%} of the answers could not be read" + (
        "" if chance is None else f"; guessing gives {chance:.4g} for {benchmark.headline}"
    )
    samples = [
        {"value": _plain(each.value), "how": each.how, "truth": row.truth, "score": score, "row": _plain_fields(row)}
        for each, row, score in zip(parsed, rows, scores, strict=True)
    ]
    return metrics, {name: intervals[name] for name in metrics if name in intervals}, details, samples


def scored_rows(benchmark: Benchmark, rows: Sequence[Row], answers: Sequence[str]) -> tuple[list[Parsed], list[float]]:
    """What each answer says, and how right it is."""
    parsers: dict[str, Parser] = {}
    parsed, scores = [], []
    for row, answer in zip(rows, answers, strict=True):
        form = benchmark.form_of(row.fields)
        parser = parsers.setdefault(form.parse, make_parser(form.parse))
        found = parser(answer, row)
        parsed.append(found)
        scores.append(0.0 if found.value is None else RULES[form.rule](found.value, row))
    return parsed, scores


def clusters_of(benchmark: Benchmark, rows: Sequence[Row]) -> list[Hashable]:
    """What each row is drawn together with: the fields `cluster`, else its picture, else its key."""
    if benchmark.cluster:
        return [tuple(str(find(row.fields, name)) for name in benchmark.cluster) for row in rows]
    return [_identity(row) or ("", *row.key) for row in rows]


def _identity(row: Row) -> str | None:
    """What rows of one picture have in common: its name, or the digest of one that lies in a table."""
    return row.picture.digest if isinstance(row.picture, ParquetPicture) else picture_name(row)


def picture_name(row: Row) -> str | None:
    """What a picture is called; None where the row has none, or only says that it has one."""
    if isinstance(row.picture, ParquetPicture | Base64Picture):
        return row.picture.name
    return str(row.picture) if isinstance(row.picture, str | int) and not isinstance(row.picture, bool) else None


def _chance(benchmark: Benchmark, rows: Sequence[Row], clusters: Sequence[Hashable]) -> dict[str, float | None] | None:
    """What guessing gives, by figure: one of the options, or yes as often as no; None where there is nothing to guess.

    It is the figure of guesses' probabilities, so a unit of four rotations has their product.
    """
    is_yes_no = benchmark.form.parse.startswith("yes_no.")
    if not is_yes_no and not any(row.options for row in rows):
        return None
    shares = [0.5 if is_yes_no else 1 / len(row.options) if row.options else 0.0 for row in rows]
    guessed = Scored(rows, np.array(shares), np.full(len(rows), 0.5))
    values = Figures(benchmark.figures, benchmark.sums, guessed, clusters).values()
    return {name: values.get(name) for name in benchmark.metric_names}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plain_fields(row: Row) -> dict[str, Any]:
    """The entry without its pictures, so that the samples can be scored again without the benchmark's files."""
    left = {name: value for name, value in row.fields.items() if not isinstance(value, ParquetPicture | bytes)}
    return {name: value for name, value in left.items() if not (isinstance(value, str) and value is _picture_text(row))}


def _picture_text(row: Row) -> str | None:
    return row.picture.text if isinstance(row.picture, Base64Picture) else None


def _captions(benchmark: Benchmark, rows: Sequence[Row], answers: Sequence[str], seed: int) -> _Outcome:
    from eval.caption_metrics import score

    references = {row.name: list(row.truth) for row in rows}
    hypotheses = {row.name: answer for row, answer in zip(rows, answers, strict=True)}
    scores = score(references, hypotheses)
    groups: dict[str, float | None] = {}
    for field in benchmark.caption_groups:
        for value in sorted({str(row.fields[field]) for row in rows if row.fields.get(field) is not None}):
            names = [row.name for row in rows if str(row.fields.get(field)) == value]
            found = score({name: references[name] for name in names}, {name: hypotheses[name] for name in names})
            groups |= {f"{name}/{value}": figure for name, figure in found.metrics.items()}
    intervals = {name: mean_interval(values, seed=seed) for name, values in scores.per_image.items()}
    details: dict[str, Any] = {
        "groups": groups,
        "tokenizer": scores.tokenizer,
        "tokenizer_reason": scores.tokenizer_reason,
        "unavailable": scores.unavailable,
    }
    samples = [
        {
            "truth": row.truth,
            **{name: values[place] for name, values in scores.per_image.items()},
            "row": _plain_fields(row),
        }
        for place, row in enumerate(rows)
    ]
    return {name: scores.metrics[name] for name in benchmark.metric_names}, intervals, details, samples


def _unjudged(benchmark: Benchmark, rows: Sequence[Row], answers: Sequence[str], seed: int) -> _Outcome:
    """The answers alone: what is right, a judge has to say."""
    del answers, seed
    note = f"{benchmark.title}: give the samples to a judge, and its verdicts to eval.score"
    return {}, {}, {"note": note}, [{"truth": row.truth, "row": _plain_fields(row)} for row in rows]
