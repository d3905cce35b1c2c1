"""Answered samples: cards with an image, a question, and each stage's answer.

Owns: which samples are shown (a random sample), their cards, and images as data URIs.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from tools.examples.report.stages import AnsweredSample, StageResult, answered_samples

_NUM_ANSWERS, _NUM_WRONG, _NUM_CAPTIONS = 8, 6, 4
_RIGHT_FROM = 0.5
"""Accuracy from which an answer counts as right on a card."""
_MAX_EMBEDDED_BYTES = 24_000
_THUMBNAIL = 320
_TINY = 120
"""Images up to this many pixels are shown with hard pixels rather than blurred."""


def sample_sections(stages: Mapping[str, StageResult], seed: int) -> list[str]:
    """Sections with random answers, with answers still wrong at the end, and with captions."""
    last = list(stages.values())[-1].model.short
    questions, captions = answered_samples(stages, "vqa"), answered_samples(stages, "caption")
    wrong = [sample for sample in questions if (sample.accuracies.get(last) or 0.0) < _RIGHT_FROM]
    lot = random.Random(seed)
    shown = draw(questions, _NUM_ANSWERS, lot)
    still_wrong = draw([sample for sample in wrong if sample not in shown], _NUM_WRONG, lot)
    note = f"{len(shown)} of {len(questions):,} questions, a random sample."
    wrong_note = f"{len(still_wrong)} of the {len(wrong):,} that the last stage gets wrong, a random sample."
    caption_note = f"{min(len(captions), _NUM_CAPTIONS)} of {len(captions):,} images, a random sample."
    return [
        section("Answers", note, shown),
        section("What it still gets wrong", wrong_note, still_wrong),
        section("Captions", caption_note, draw(captions, _NUM_CAPTIONS, lot), kind="captions"),
    ]


def draw(samples: Sequence[AnsweredSample], number: int, lot: random.Random) -> list[AnsweredSample]:
    """A random sample of at most `number`, of different images."""
    drawn: dict[Path, AnsweredSample] = {}
    for sample in lot.sample(samples, len(samples)):
        if len(drawn) == number:
            break
        drawn.setdefault(sample.image, sample)
    return list(drawn.values())


def section(title: str, note: str, samples: Sequence[AnsweredSample], kind: str = "") -> str:
    """Cards of `samples` under a heading; `kind` are classes of their style, and `captions` says what they are."""
    if not samples:
        return ""
    cards = "".join(_card(sample, is_caption="captions" in kind.split()) for sample in samples)
    return f'<h2>{title}</h2><p class="note">{note}</p><div class="samples {kind}">{cards}</div>'


def _card(sample: AnsweredSample, *, is_caption: bool) -> str:
    rows = "".join(
        _row(escape(name), _verdict(sample.accuracies[name]), _said(answer)) for name, answer in sample.answers.items()
    )
    rows += _row("reference", "", escape(sample.references[0]), "truth") if is_caption else ""
    rows += "" if is_caption else _row("right", "<dd></dd>", escape(sample.references[0]), "truth")
    question = f"<h3>{escape(sample.question)}</h3>" if sample.question else ""
    return f'<article class="sample">{_image(sample)}<div>{question}<dl>{rows}</dl></div></article>'


def _row(name: str, verdict: str, text: str, kind: str = "") -> str:
    return f'<div class="{kind}"><dt>{name}</dt>{verdict}<dd>{text}</dd></div>'


def _said(answer: str) -> str:
    return escape(answer) if answer.strip() else '<span class="empty">(no words)</span>'


def _verdict(accuracy: float | None) -> str:
    """A mark, or nothing for a caption, which is not right or wrong."""
    if accuracy is None:
        return ""
    is_right = accuracy >= _RIGHT_FROM
    kind, mark = ("right", "✓") if is_right else ("wrong", "✗")
    return f'<dd class="{kind}-mark" title="{kind}">{mark}</dd>'


def _image(sample: AnsweredSample) -> str:
    uri, is_tiny = image_uri(sample.image)
    alt = escape(sample.question or sample.references[0], quote=True)
    return f'<img src="{uri}" alt="image of: {alt}"{" class=tiny" if is_tiny else ""}>'


@lru_cache(maxsize=256)
def image_uri(path: Path) -> tuple[str, bool]:
    """An image as a data URI, small files as they are, large ones as a thumbnail; and whether it is tiny."""
    from data_pipeline.images import open_image

    content = path.read_bytes() if path.is_file() else b""
    image = open_image(path)
    is_tiny = max(image.size) <= _TINY
    kind = _browser_type(content)
    if kind is None or len(content) > _MAX_EMBEDDED_BYTES:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=82)
        content, kind = encoded.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}", is_tiny


def _browser_type(content: bytes) -> str | None:
    """The media type of a file that any browser shows, by its first bytes."""
    for start, kind in ((b"\xff\xd8", "image/jpeg"), (b"\x89PNG", "image/png")):
        if content.startswith(start):
            return kind
    return None
