"""Answers to look at: held-out pictures with what was asked, what the model says, and what the data say.

Owns the page (one HTML file, nothing loaded from elsewhere, all text escaped) and the picture of it that TensorBoard
shows. Does not own which pictures they are (`trainer.held_out`) or who writes the answers (`trainer.validation`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainer.held_out import Example
from trainer.pages import picture_tag, write_page

THUMBNAIL = 384
"""Longest side, in pixels, of a picture on the page."""

_STYLE = """
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; border-top: 1px solid #ccc; padding-top: .8rem; } img { max-width: 100%; }
dt { color: #666; font-size: .85rem; } dd { margin: 0 0 .4rem; overflow-wrap: anywhere; white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Answered:
    """A held-out picture and what the model says about it."""

    example: Example
    answer: str


def write_answers(
    file: Path,
    title: str,
    metrics: Mapping[str, float],
    answers: Sequence[Answered],
    *,
    grid: Image.Image | None = None,
) -> None:
    """The page, complete or absent; `grid` is a picture that stands before the answers."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:.6g}</td></tr>" for name, value in metrics.items())
    figures = "".join(_figure(answered) for answered in answers)
    shown = picture_tag(grid, "similarities", max(grid.size)) if grid is not None else ""
    write_page(file, title, f"<table>{rows}</table>{shown}<section>{figures}</section>", _STYLE)


def _figure(answered: Answered) -> str:
    example = answered.example
    terms = {"asked": example.question, "answered": answered.answer, "the data say": example.reference}
    words = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in terms.items() if text)
    return (
        f"<figure>{picture_tag(example.picture, example.key, THUMBNAIL)}"
        f"<dl>{words}<dt>{escape(example.key)}</dt></dl></figure>"
    )


def caption_of(answered: Answered) -> str:
    """What stands below a picture where there is room for one text."""
    example = answered.example
    lines = [f"Q: {example.question}"] if example.question else []
    return "\n".join([*lines, f"A: {answered.answer}", f"({example.reference})"])


def contact_sheet(answers: Sequence[Answered], *, side: int = 256, columns: int = 4) -> Image.Image:
    """The pictures in rows, each with its texts below, as one RGB picture."""
    font, text_height = ImageFont.load_default(12), 112
    num_rows = -(-len(answers) // columns)
    sheet = Image.new("RGB", (side * min(columns, len(answers)), (side + text_height) * num_rows), "white")
    draw = ImageDraw.Draw(sheet)
    for number, answered in enumerate(answers):
        left, top = number % columns * side, number // columns * (side + text_height)
        picture = answered.example.picture.copy()
        picture.thumbnail((side - 8, side))
        sheet.paste(picture, (left, top))
        lines = [short for line in caption_of(answered).splitlines() for short in textwrap.wrap(line, 40)]
        draw.text((left, top + side + 2), "\n".join(lines[:7]), fill="black", font=font)
    return sheet
