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

from models.errors import InputError
from tools.report.page import Curve, page
from tools.report.stages import STAGES, StageResult, check_stages
from tools.report.text import text_report

__all__ = ["STAGES", "Report", "StageResult", "build_report", "read_run"]


@dataclass(frozen=True)
class Report:
    """Where a report lies, and its text."""

    json: Path
    text: Path
    html: Path
    printed: str


def build_report(
    out: Path,
    *,
    seconds: Mapping[str, float],
    stages: Mapping[str, StageResult],
    curves: Mapping[str, Path],
    title: str = "Quickstart",
    seed: int = 0,
) -> Report:
    """Write report.json, report.txt and report.html into the folder `out`.

    `seconds` says how long each step took; an entry `total` is taken as the whole, else their sum is. `stages` are
    evaluations keyed by "before", "align", "lora", "nf4" (some may lack), `curves` the metrics.jsonl of each training
    stage. `seed` draws the samples that the page shows.

    Raises:
        InputError: an unknown stage, stages measured by different protocols, or a file that is missing.
    """
    ordered = check_stages(stages)
    drawn = {name: read_curve(path) for name, path in curves.items()}
    summary = {"seconds": dict(seconds), "stages": {name: stage.summary() for name, stage in ordered.items()}}
    printed = text_report(ordered, seconds)
    report = Report(out / "report.json", out / "report.txt", out / "report.html", printed)
    out.mkdir(parents=True, exist_ok=True)
    _write(report.html, page(title, ordered, drawn, seconds, seed=seed))
    _write(report.text, printed)
    _write(report.json, json.dumps(summary, indent=2) + "\n")
    return report


def read_run(run: Path) -> dict[str, Any]:
    """`build_report`'s arguments from a run folder: eval/STAGE.json, STAGE/metrics.jsonl, seconds.json.

    Raises:
        InputError: the folder has no evaluation of a known stage.
    """
    evaluations = {name: run / "eval" / f"{name}.json" for name in STAGES}
    stages = {name: StageResult.read(path) for name, path in evaluations.items() if path.is_file()}
    if not stages:
        raise InputError(f"{run} holds no eval/STAGE.json of the stages {', '.join(STAGES)}; make them with eval.run")
    curves = {name: path for name in STAGES if (path := run / name / "metrics.jsonl").is_file()}
    timed = run / "seconds.json"
    seconds = json.loads(timed.read_text(encoding="utf-8")) if timed.is_file() else {}
    return {"stages": stages, "curves": curves, "seconds": seconds}


def read_curve(path: Path) -> Curve:
    """The steps, losses and speeds of a metrics.jsonl; a last line that was cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such training log") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON") from None
    rows = [row for row in rows if "loss" in row]
    return Curve(
        steps=[int(row["step"]) for row in rows],
        losses=[float(row["loss"]) for row in rows],
        samples_per_s=[float(row["samples_per_s"]) for row in rows if "samples_per_s" in row],
        tokens_per_s=[float(row["tokens_per_s"]) for row in rows if "tokens_per_s" in row],
    )


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
