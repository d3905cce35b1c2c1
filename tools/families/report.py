"""What the twins reached: RUN/report.json and a page with pictures, from the files that training and scoring wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from models.files import read_lines, write_json
from tools.families.steps import Twin

NUM_SHOWN = 8
_STYLE = """
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; } figure img { width: 8rem; }
img { max-width: 100%; } .wrong { color: #b00; }
"""
_HEADINGS = {
    "vqa_accuracy": "VQA accuracy %",
    "vqa_accuracy_shuffled": "with exchanged pictures %",
    "recall_at_1": "Recall@1",
    "chance": "chance of that",
    "tokens_per_step": "tokens a forward",
    "seconds": "seconds",
}


def measured(twin: Twin, run: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """One twin's line.

    `recall_at_1` is the lower of picture-to-text and text-to-picture among the validation's pairs, `chance` one over
    their number, both None without a contrastive stage; `tokens_per_step` is speculative decoding's, None without it.
    """
    home = run / twin.recipe
    results = json.loads((home / "scores.json").read_text(encoding="utf-8"))["results"]
    accuracy = {each["shuffled"]: each["metrics"]["vqa_accuracy"] for each in results if each["task"] == "vqa"}
    retrieval = _retrieval(home)
    speculation = home / "speculation.json"
    speculated = json.loads(speculation.read_text(encoding="utf-8")) if speculation.is_file() else {}
    return {
        "vqa_accuracy": accuracy[False],
        "vqa_accuracy_shuffled": accuracy[True],
        "recall_at_1": min((retrieval[name] for name in retrieval if name.endswith("/recall_at_1")), default=None),
        "chance": 1 / retrieval["validation/samples"] if retrieval else None,
        "tokens_per_step": speculated["tokens_per_forward"] if speculated else None,
        "seconds": round(sum(value for name, value in seconds.items() if name.endswith(f" {twin.recipe}")), 1),
    }


def _retrieval(home: Path) -> dict[str, float]:
    """The last validation in which pictures and texts were compared."""
    for log in sorted(home.glob("*/validation.jsonl")):
        lines: list[dict[str, float]] = read_lines(log)
        if lines and any(name.endswith("/recall_at_1") for name in lines[-1]):
            return lines[-1]
    return {}


def write_report(twins: Sequence[Twin], run: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """RUN/report.json and RUN/report.html; what they say."""
    from trainer.pages import write_page

    report = {twin.recipe: measured(twin, run, seconds) for twin in twins}
    write_json(run / "report.json", report)
    heads = "".join(f"<th>{escape(text)}</th>" for text in ("twin", *_HEADINGS.values()))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_shown(line[key])}</td>' for key in _HEADINGS)}</tr>"
        for name, line in report.items()
    )
    body = f"<table><tr>{heads}</tr>{rows}</table>" + "".join(_pictures(twin, run) for twin in twins)
    write_page(run / "report.html", "Every family's twin on the small world", body, _STYLE)
    return report


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _pictures(twin: Twin, run: Path) -> str:
    """Held-out questions with what the bundle answers, and the similarities of a contrastive stage."""
    from PIL import Image

    from trainer.pages import picture_tag

    home = run / twin.recipe
    figures = []
    for sample in read_lines(home / "scores.vqa.jsonl")[:NUM_SHOWN]:
        tag = picture_tag(Image.open(sample["picture"]).convert("RGB"), sample["question"], 128)
        kind = "" if sample["accuracy"] >= 1 else ' class="wrong"'
        says = f"{escape(sample['question'])}<br><b{kind}>{escape(sample['answer'])}</b>"
        figures.append(f"<figure>{tag}<figcaption>{says}</figcaption></figure>")
    grids = sorted(home.glob("*/validation/step_*.png"))
    grid = picture_tag(Image.open(grids[-1]), "similarities", 1400) if grids else ""
    return f"<h2>{escape(twin.recipe)}</h2><section>{''.join(figures)}</section>{grid}"
