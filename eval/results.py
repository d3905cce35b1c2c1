"""An evaluation on disk and on the screen.

    OUT.json            {"model", "seconds", "results": [one per task: metrics, intervals, protocol, config, ...]}
    OUT.NAME.jsonl      the samples of the task called NAME: what was asked, answered, and what it scored

Owns: these files and the table. OUT.json is written last and at once, so where it lies the evaluation is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError

_HEADER = ("task", "metric", "value", "95 % interval", "samples")


def samples_path(out: Path, name: str) -> Path:
    """Where the samples of the task called `name` lie."""
    return out.with_name(f"{out.stem}.{name}.jsonl")


def check_out(out: Path) -> None:
    """Raise InputError if `out` can't be written; before hours of work, not after."""
    if out.suffix != ".json":
        raise InputError(f"--out {out}: a file that ends in .json is needed")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: its folder can't be made: {error.strerror}") from None


def write_samples(out: Path, name: str, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write one task's samples, one JSON value a line."""
    path = samples_path(out, name)
    _write(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return path


def write_results(out: Path, evaluation: Mapping[str, Any]) -> None:
    """Write OUT.json, indented."""
    _write(out, json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Every metric of every result as one aligned text table; what is missing stands there with its reason."""
    rows = [_HEADER, *(row for result in results for row in _rows(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric, value in result["metrics"].items():
        interval = result["intervals"].get(metric)
        if value is None:
            number, span = "-", result["unavailable"][metric]
        else:
            number = f"{value:.2f}" if metric == "vqa_accuracy" else f"{value:.4f}"
            span = f"{interval['low']:.4g} to {interval['high']:.4g}" if interval else ""
        rows.append((result["name"], metric, number, span, str(result["num_samples"])))
    return rows
