"""HTML files of a run: one file each, nothing loaded from elsewhere, written atomically. Owns their common frame."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

from PIL import Image

from models.common.files import write_text

logger = logging.getLogger(__name__)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
td, th { padding-right: 1.5rem; font-variant-numeric: tabular-nums; text-align: left; }
"""


@contextmanager
def best_effort(file: Path) -> Iterator[None]:
    """For optional files: an OSError gives a warning, and the run continues."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{file}: {error.strerror or error}; training goes on without it")


def write_page(file: Path, title: str, body: str, style: str = "") -> None:
    """Write `body`, HTML whose texts are escaped, below its title; the folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    name = escape(title)
    write_text(
        file,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}{style}</style>'
        f"<h1>{name}</h1>{body}</html>\n",
    )


def image_tag(image: Image.Image, name: str, longest_side: int) -> str:
    """An <img> that holds its JPEG."""
    small = image.copy()
    small.thumbnail((longest_side, longest_side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{content}">'
