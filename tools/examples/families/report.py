"""The tiny configs' scores: RUN/report.json and a page with images, from the files of training and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from models.common.documents import read_json
from models.common.files import read_lines, write_json
from tools.examples.families.steps import TinyConfig

NUM_SHOWN = 8
_STYLE = """
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; } figure img { width: 8rem; }
img { max-width: 100%; } .wrong { color: #b00; }
"""
_HEADINGS = {
    "vqa_accuracy": "VQA accuracy %",
    "vqa_accuracy_shuffled": "with exchanged images %",
    "recall_at_1": "Recall@1",
    "chance": "chance of that",
    "tokens_per_step": "tokens a forward",
    "seconds": "seconds",
}


def measured(config: TinyConfig, run: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The scores of one tiny config: of several exams the lowest accuracy, and the highest with exchanged images.

    `recall_at_1` is the lower of image-to-text and text-to-image among the validation's pairs, `chance` one over
    their number, both None without a contrastive stage; `tokens_per_step` is speculative decoding's, None without it.
    """
    home = run / config.recipe
    results = read_json(home, "scores.json")["results"]
    accuracy: dict[bool, list[float]] = {False: [], True: []}
    for each in (each for each in results if each["task"] == "vqa"):
        accuracy[each["shuffled"]].append(each["metrics"]["vqa_accuracy"])
    retrieval = _retrieval(home)
    speculation = home / "speculation.json"
    speculated = read_json(home, speculation.name) if speculation.is_file() else {}
    return {
        "vqa_accuracy": min(accuracy[False]),
        "vqa_accuracy_shuffled": max(accuracy[True]),
        "recall_at_1": min((retrieval[name] for name in retrieval if name.endswith("/recall_at_1")), default=None),
        "chance": 1 / retrieval["validation/samples"] if retrieval else None,
        "tokens_per_step": speculated["tokens_per_forward"] if speculated else None,
        "seconds": round(sum(value for name, value in seconds.items() if name.endswith(f" {config.recipe}")), 1),
    }


def _retrieval(home: Path) -> dict[str, float]:
    """The last validation in which images and texts were compared."""
    for log in sorted(home.glob("*/validation.jsonl")):
        lines: list[dict[str, float]] = read_lines(log)
        if lines and any(name.endswith("/recall_at_1") for name in lines[-1]):
            return lines[-1]
    return {}


def write_report(configs: Sequence[TinyConfig], run: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write RUN/report.json and RUN/report.html; returns report.json's content."""
    from trainer.validation.html_report import write_page

    report = {config.recipe: measured(config, run, seconds) for config in configs}
    write_json(run / "report.json", report)
    heads = "".join(f"<th>{escape(text)}</th>" for text in ("tiny config", *_HEADINGS.values()))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{_shown(line[key])}</td>' for key in _HEADINGS)}</tr>"
        for name, line in report.items()
    )
    body = f"<table><tr>{heads}</tr>{rows}</table>" + "".join(_images(config, run) for config in configs)
    write_page(run / "report.html", "Every family's tiny config on the synthetic world", body, _STYLE)
    return report


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _images(config: TinyConfig, run: Path) -> str:
    """Held-out questions with what the bundle answers, and the similarities of a contrastive stage."""
    from PIL import Image

    from trainer.validation.html_report import image_tag

    home = run / config.recipe
    figures = []
    for sample in read_lines(home / "scores.vqa.jsonl")[:NUM_SHOWN]:
        tag = image_tag(Image.open(sample["picture"]).convert("RGB"), sample["question"], 128)
        kind = "" if sample["accuracy"] >= 1 else ' class="wrong"'
        says = f"{escape(sample['question'])}<br><b{kind}>{escape(sample['answer'])}</b>"
        figures.append(f"<figure>{tag}<figcaption>{says}</figcaption></figure>")
    grids = sorted(home.glob("*/validation/step_*.png"))
    grid = image_tag(Image.open(grids[-1]), "similarities", 1400) if grids else ""
    return f"<h2>{escape(config.recipe)}</h2><section>{''.join(figures)}</section>{grid}"
