"""A run's report: report.json for programs, report.txt for the terminal, report.html for people.

    eval.run's OUT.json and samples per stage, metrics.jsonl per training stage --build_report--> OUT/report.*

Owns: reading those files and writing these three. Does not measure anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.documents import parse, read_value, understanding
from models.common.errors import InputError
from models.common.files import split_lines, write_text
from tools.examples.report.page import Curve, page
from tools.examples.report.stages import ScoredModel, StageResult, check_protocols, scored_models
from tools.examples.report.text import text_report
from trainer.tracking.numerics import describe, from_metrics, warning

__all__ = ["Report", "ScoredModel", "StageResult", "build_report", "read_run"]


@dataclass(frozen=True)
class Report:
    """The three files of a report, and its text."""

    json: Path
    text: Path
    html: Path
    printed: str


def build_report(
    out: Path,
    *,
    seconds: Mapping[str, float],
    stages: Mapping[str, StageResult],
    curves: Mapping[str, Curve],
    title: str = "Quickstart",
    seed: int = 0,
) -> Report:
    """Write report.json, report.txt and report.html into the folder `out`.

    Args:
        seconds: how long each step took; an entry `total` is the whole time, else their sum is.
        stages: evaluations by their models' names, in the order of the run.
        curves: what each training stage logged.
        seed: selects the samples that the page shows.

    Raises:
        InputError: models measured by different protocols, or a file that is missing.
    """
    check_protocols(stages)
    summary = {"seconds": dict(seconds), "stages": {name: stage.summary() for name, stage in stages.items()}}
    printed = text_report(stages, seconds)
    report = Report(out / "report.json", out / "report.txt", out / "report.html", printed)
    out.mkdir(parents=True, exist_ok=True)
    write_text(report.html, page(title, stages, curves, seconds, seed=seed))
    write_text(report.text, printed)
    write_text(report.json, json.dumps(summary, indent=2) + "\n")
    return report


def read_run(run: Path) -> dict[str, Any]:
    """`build_report`'s arguments from a run: recipe.json, eval/NAME.json, STAGE/metrics.jsonl, seconds.json.

    Raises:
        InputError: the folder is no run, or has no evaluation of any of its models.
    """
    file = run / "recipe.json"
    if not file.is_file():
        raise InputError(f"{file}: not there; give the directory that `run` names in a recipe")
    recipe = read_value(file)
    with understanding(file):
        models = scored_models(recipe["stages"])
    evaluations = {model: run / "eval" / f"{model.name}.json" for model in models}
    stages = {model.name: StageResult.read(model, path) for model, path in evaluations.items() if path.is_file()}
    if not stages:
        names = ", ".join(model.name for model in models)
        raise InputError(f"{run} holds no eval/NAME.json of the models {names}; make them with eval.run")
    logs = {model: run / model.name / "metrics.jsonl" for model in models if model.kind == "stage"}
    curves = {
        model.name: read_curve(path, _what_learns(model, recipe["stages"][model.name]))
        for model, path in logs.items()
        if path.is_file()
    }
    timed = run / "seconds.json"
    seconds = read_value(timed) if timed.is_file() else {}
    return {"stages": stages, "curves": curves, "seconds": seconds}


def _what_learns(model: ScoredModel, stage: Mapping[str, Any]) -> str:
    """`LoRA: projector and language`: a stage and the parts of the model that it tunes."""
    parts = [part for part, tuning in stage["tune"].items() if tuning and tuning.get("kind", "frozen") != "frozen"]
    return f"{model.short}: {' and '.join(parts)}"


def read_curve(path: Path, title: str) -> Curve:
    """The steps, losses and speeds of a metrics.jsonl; a last line that was cut off is left out."""
    try:
        lines = split_lines(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such training log") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse(line, f"{path}, line {number}"))
        except InputError:
            if number < len(lines):
                raise
    with understanding(path):
        rows = [row for row in rows if "loss" in row]
        return Curve(
            title,
            steps=[int(row["step"]) for row in rows],
            losses=[float(row["loss"]) for row in rows],
            samples_per_s=[float(row["samples_per_s"]) for row in rows if "samples_per_s" in row],
            tokens_per_s=[float(row["tokens_per_s"]) for row in rows if "tokens_per_s" in row],
            numerics=[line for row in rows for line in _numerics(row)],
        )


def _numerics(row: Mapping[str, float]) -> list[str]:
    """What the line of a stage's first step says of its gradient's precision."""
    findings = from_metrics(row)
    if not findings:
        return []
    told = warning(findings, "the stage's precision", image_is_first=None)
    return [f"First gradient beside fp32's: {describe(findings)}.", *([told] if told else [])]
