"""`python -m tools.examples.photos.report RUN`: the figures of a run on photos as JSON, text and a page.

    RUN/eval/NAME.json, RUN/STAGE/metrics.jsonl, RUN/seconds.json, RUN/lora/killed.json --> RUN/report.{json,txt,html}

Owns the three files and the text. The page is `tools.examples.photos.page`'s. Does not measure anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.common.errors import run_cli
from models.common.files import write_json, write_text
from tools.examples.photos.figures import killed_line, read_facts, read_results, summary
from tools.examples.photos.page import page
from tools.examples.report import read_curve
from tools.examples.report.stages import StageResult
from tools.examples.report.text import aligned, duration, measured


def main(argv: list[str]) -> int:
    """Write the three files, and print the text."""
    parser = argparse.ArgumentParser(prog="python -m tools.examples.photos.report", description="A run's report.")
    parser.add_argument("run", type=Path, help="the directory of `make photos`")
    parser.add_argument("--seed", type=int, default=0, help="draws the photos that the page shows")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    results = read_results(run)
    facts = read_facts(run, results)
    curves = {
        "align": read_curve(run / "align" / "metrics.jsonl", "Align: projector"),
        "lora": read_curve(run / "lora" / "metrics.jsonl", "LoRA: projector and language model"),
    }
    write_text(run / "report.html", page(results, curves, facts, seed=arguments.seed))
    write_text(run / "report.txt", text_report(results, facts))
    write_json(run / "report.json", {**facts, "models": {name: summary(each) for name, each in results.items()}})
    return 0


def text_report(results: Mapping[str, StageResult], facts: Mapping[str, Any]) -> str:
    """A table of the models, then what happened on the way and how long each step took."""
    rows = [("model", "image gain, nats a token", "CIDEr", "CIDEr, exchanged photos")]
    for result in results.values():
        rows.append(
            (
                result.model.title,
                measured(result, "image_gain", "image_gain", shuffled=False),
                measured(result, "caption", "CIDEr", shuffled=False),
                measured(result, "caption", "CIDEr", shuffled=True),
            )
        )
    counts, seconds = facts["num_photos"], facts["seconds"]
    lines = [
        f"{counts['train']:,} photos trained on, {counts['held_out']:,} held out by seed {facts['seed']};"
        f" {facts['precision']}, {facts['machine']}; [95 % bootstrap interval]",
        "",
        *aligned(rows),
        "",
        f"{facts['num_different']} different captions of {facts['num_captions']}; {killed_line(facts)}",
    ]
    for result in results.values():
        lines += ["", f"{result.model.title}: {result.advice}"] if result.advice else []
    width = max((len(name) for name in seconds), default=0)
    lines += ["", *(f"{name.ljust(width)}  {duration(value):>12}" for name, value in seconds.items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
