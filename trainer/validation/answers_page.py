"""Answers to look at: held-out images with the question, the model's answer and the data's answer.

Owns the page (one HTML file, nothing loaded from elsewhere, all text escaped) and the image of it that TensorBoard
shows. Does not own the choice of images (`trainer.validation.held_out`) or the answers
(`trainer.validation.answering`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainer.validation.held_out import Example
from trainer.validation.html_report import image_tag, write_page

THUMBNAIL = 384
"""Longest side, in pixels, of an image on the page."""

_STYLE = """
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; border-top: 1px solid #ccc; padding-top: .8rem; } img { max-width: 100%; }
dt { color: #666; font-size: .85rem; } dd { margin: 0 0 .4rem; overflow-wrap: anywhere; white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Answered:
    """A held-out image with its question, the model's answer and the data's."""

    example: Example
    answer: str


def write_answers(
    file: Path,
    title: str,
    metrics: Mapping[str, float],
    answers: Sequence[Answered],
    *,
    notes: Mapping[str, str] | None = None,
    grid: Image.Image | None = None,
) -> None:
    """Write the page atomically; `notes` are what tasks say, by name, and `grid` an image shown before the answers."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:.6g}</td></tr>" for name, value in metrics.items())
    said = "".join(f"<p><b>{escape(name)}</b>: {escape(note)}</p>" for name, note in (notes or {}).items())
    figures = "".join(_figure(answered) for answered in answers)
    shown = image_tag(grid, "similarities", max(grid.size)) if grid is not None else ""
    write_page(file, title, f"<table>{rows}</table>{said}{shown}<section>{figures}</section>", _STYLE)


def _figure(answered: Answered) -> str:
    example = answered.example
    terms = {"asked": example.question, "answered": answered.answer, "the data say": example.reference}
    words = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in terms.items() if text)
    return (
        f"<figure>{image_tag(example.image, example.key, THUMBNAIL)}"
        f"<dl>{words}<dt>{escape(example.key)}</dt></dl></figure>"
    )


def caption_of(answered: Answered) -> str:
    """The text below an image where there is room for only one."""
    example = answered.example
    lines = [f"Q: {example.question}"] if example.question else []
    return "\n".join([*lines, f"A: {answered.answer}", f"({example.reference})"])


def contact_sheet(answers: Sequence[Answered], *, side: int = 256, columns: int = 4) -> Image.Image:
    """The images in rows, each with its texts below, as one RGB image."""
    font, text_height = ImageFont.load_default(12), 112
    num_rows = -(-len(answers) // columns)
    sheet = Image.new("RGB", (side * min(columns, len(answers)), (side + text_height) * num_rows), "white")
    draw = ImageDraw.Draw(sheet)
    for number, answered in enumerate(answers):
        left, top = number % columns * side, number // columns * (side + text_height)
        image = answered.example.image.copy()
        image.thumbnail((side - 8, side))
        sheet.paste(image, (left, top))
        lines = [short for line in caption_of(answered).splitlines() for short in textwrap.wrap(line, 40)]
        draw.text((left, top + side + 2), "\n".join(lines[:7]), fill="black", font=font)
    return sheet
