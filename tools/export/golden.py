"""The golden set of the parity report: images, questions and answers that every model of a report is read on.

Drawn images by default, the same at every call; `load_golden` takes others, such as held-out samples of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.images import open_image
from models.common.documents import read_value
from models.common.errors import InputError

QUESTIONS = (
    ("What is in the picture?", "Four coloured shapes."),
    ("How many are there?", "Four."),
    ("Describe the picture.", "Some circles and rectangles on a plain background."),
    ("What colour is it?", "Several colours."),
)
NUM_DRAWN = 8


@dataclass(frozen=True)
class Probe:
    """One question about one image, and its golden answer."""

    image: Image.Image
    question: str
    answer: str


def drawn(num: int = NUM_DRAWN) -> list[Probe]:
    """Drawn images of several shapes and aspect ratios, each with a question and an answer that is true of it."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(num):
        width, height = (int(side) for side in generator.integers(40, 400, 2))
        image = Image.new("RGB", (width, height), tuple(int(level) for level in generator.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            left, top = int(generator.integers(0, width)), int(generator.integers(0, height))
            box = (left, top, left + int(generator.integers(8, 200)), top + int(generator.integers(8, 200)))
            colour = tuple(int(level) for level in generator.integers(0, 256, 3))
            (draw.ellipse if generator.random() < 0.5 else draw.rectangle)(box, fill=colour)
        found.append(Probe(image, *QUESTIONS[number % len(QUESTIONS)]))
    return found


def load_golden(file: Path) -> list[Probe]:
    """Probes of a JSON list of {"image", "question", "answer"}; images are paths beside the file.

    Raises InputError, naming file and entry, for anything else.
    """
    try:
        entries = read_value(file)
    except OSError as error:
        raise InputError(f"{file}: no JSON file that can be read ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{file}: a list of {{"image", "question", "answer"}} is expected')
    probes = []
    for number, entry in enumerate(entries):
        fields = [entry.get(key) if isinstance(entry, dict) else None for key in ("image", "question", "answer")]
        if not all(isinstance(field, str) and field for field in fields):
            raise InputError(f'{file}: entry {number} has no "image", "question" and "answer" that are text')
        image, question, answer = fields
        probes.append(Probe(open_image(file.parent / str(image)), str(question), str(answer)))
    return probes
