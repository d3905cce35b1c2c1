"""A tiny benchmark on disk: three images, four questions with ten answers each, captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "lime", "blue")
ASKED = ((0, "Which colour?"), (1, "Which colour?"), (2, "Which colour?"), (0, "Is it red?"))
ANSWERS = ("red", "lime", "blue", "yes")
PROMPT = "Describe it."


@dataclass(frozen=True)
class TinyBenchmark:
    """Paths of the files, whose images are one plain colour each."""

    folder: Path
    images: Path
    questions: Path
    annotations: Path
    captions: Path


def make_benchmark(folder: Path) -> TinyBenchmark:
    """Write the benchmark into `folder`."""
    tiny = TinyBenchmark(
        folder, *(folder / name for name in ("images", "questions.json", "annotations.json", "captions.json"))
    )
    tiny.images.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (16, 16), colour).save(tiny.images / f"scene_{number:012d}.png")
    questions = [
        {"question_id": place, "image_id": image, "question": text} for place, (image, text) in enumerate(ASKED)
    ]
    annotations = [
        {
            "question_id": place,
            "answer_type": "yes/no" if answer == "yes" else "other",
            "question_type": "what",
            "answers": [{"answer": answer, "answer_id": number} for number in range(10)],
        }
        for place, answer in enumerate(ANSWERS)
    ]
    images = [{"id": number, "file_name": f"scene_{number:012d}.png"} for number in range(3)]
    captions = [
        {"id": 2 * number + version, "image_id": number, "caption": text.format(colour)}
        for number, colour in enumerate(COLOURS)
        for version, text in enumerate(("A {} square.", "all is {}"))
    ]
    write(tiny.questions, {"questions": questions})
    write(tiny.annotations, {"annotations": annotations})
    write(tiny.captions, {"images": images, "annotations": captions})
    return tiny


def repeat_questions(tiny: TinyBenchmark, times: int) -> None:
    """Have the benchmark ask each question many times."""
    for path, key in ((tiny.questions, "questions"), (tiny.annotations, "annotations")):
        entries = json.loads(path.read_text())[key]
        many = [
            {**entry, "question_id": 4 * time + place} for time in range(times) for place, entry in enumerate(entries)
        ]
        write(path, {key: many})


def write(path: Path, value: Any) -> Path:
    """Write a value as JSON."""
    path.write_text(json.dumps(value))
    return path


class Seer:
    """A predictor that answers by the colour it is shown.

    Its loss is 1 nat a word where that colour stands in the answer, else 2.
    """

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.prompts: list[str] = []

    def answer(self, queries: Sequence[Any], decoding: Any) -> list[str]:
        assert decoding.temperature == 0.0
        self.batch_sizes.append(len(queries))
        self.prompts += [query.turns[0].text for query in queries]
        return [self._say(query) for query in queries]

    def loss(self, queries: Sequence[Any], answers: Sequence[str]) -> list[tuple[float, int]]:
        pairs = zip(queries, answers, strict=True)
        return [
            ((1.0 if colour_of(query) in answer else 2.0) * len(answer.split()), len(answer.split()))
            for query, answer in pairs
        ]

    def _say(self, query: Any) -> str:
        text, colour = query.turns[0].text, colour_of(query)
        if text == PROMPT:
            return f"a {colour} square"
        return ("yes" if colour == "red" else "no") if text.startswith("Is it red?") else colour


def colour_of(query: Any) -> str:
    pixels = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}
    return pixels[query.images[0].getpixel((8, 8))]
