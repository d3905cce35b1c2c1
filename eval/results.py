"""An evaluation's files on disk and its table on the screen.

    OUT.json            {"model", "results": [one per task: metrics, intervals, protocol, asked, config, ...]}
    OUT.NAME.jsonl      the samples of the task called NAME: question, answer and score
    OUT.facts.json      what moves numbers and is no part of the protocol: batch size, device, dtype, versions, seconds

Owns: these files and the table. OUT.json is written after the samples and atomically, so if it exists the evaluation is
complete. It and the samples hold nothing that depends on time or on the number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.common.documents import parse
from models.common.errors import InputError
from models.common.files import split_lines, write_text

_TARGETS = ("truth", "label", "human_answers", "references")
_ERRORS_TO_A_SIDE = 1.96
_HEADER = ("task", "metric", "value", "95 % interval", "samples")


def samples_path(out: Path, name: str) -> Path:
    """The file with the samples of the task called `name`."""
    return out.with_name(f"{out.stem}.{name}.jsonl")


def check_out(out: Path) -> None:
    """Raise InputError if `out` can't be written. Called before hours of work, not after."""
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
    write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return path


def write_results(out: Path, evaluation: Mapping[str, Any]) -> None:
    """Write OUT.json, indented."""
    write_text(out, json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> list[Any]:
    """One task's samples; raises OSError, or InputError where a line is no JSON."""
    return [parse(line, path) for line in split_lines(path.read_text(encoding="utf-8"))]


def write_facts(out: Path, facts: Mapping[str, Any]) -> None:
    """Write OUT.facts.json, indented."""
    write_text(out.with_name(f"{out.stem}.facts.json"), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def write_lmms_eval(folder: Path, evaluation: Mapping[str, Any], out: Path) -> None:
    """Write an evaluation as lmms-eval does: results.json, and samples_NAME.jsonl for each task.

    Metrics are called NAME,none as there. A standard error is the interval's width by 2 x 1.96; `doc_id` is a sample's
    place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results, counts = {}, {}
    for result in evaluation["results"]:
        name = result["name"]
        results[name] = {"alias": name}
        for metric, value in result["metrics"].items():
            interval = result["intervals"].get(metric)
            results[name][f"{metric},none"] = value
            error = (interval["high"] - interval["low"]) / (2 * _ERRORS_TO_A_SIDE) if interval else "N/A"
            results[name][f"{metric}_stderr,none"] = error
        samples = read_samples(out.with_name(result["samples"]))
        counts[name] = {"original": len(samples), "effective": len(samples)}
        lines = [_lmms_eval_sample(place, sample) for place, sample in enumerate(samples)]
        write_text(
            folder / f"samples_{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
    head = {"results": results, "n-samples": counts, "model_name": evaluation["model"], "model_source": "sightline"}
    write_text(folder / "results.json", json.dumps(head, indent=2, ensure_ascii=False) + "\n")


def _lmms_eval_sample(place: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One sample: the question's entry as `doc`, the answer as its response."""
    answer = sample.get("answer", "")
    doc = sample.get("row") or {key: value for key, value in sample.items() if key != "answer"}
    target = next((sample[key] for key in _TARGETS if key in sample), None)
    return {"doc_id": place, "doc": doc, "target": target, "resps": [[answer]], "filtered_resps": [answer]}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Every metric of every result as one aligned text table; a missing metric is shown with its reason."""
    rows = [_HEADER, *(row for result in results for row in _rows(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    notes = [f"{result['name']}: {result['note']}" for result in results if "note" in result]
    notes += [
        f"{result['name']}: {result['num_unasked']} questions could not be asked, the first: "
        f"{result['unasked'][0]['reason']}"
        for result in results
        if "num_unasked" in result
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *notes])


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
