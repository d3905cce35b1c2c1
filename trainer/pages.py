"""HTML files of a run: one file each, nothing loaded from elsewhere, complete or absent. Owns their frame."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

from PIL import Image

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
td, th { padding-right: 1.5rem; font-variant-numeric: tabular-nums; text-align: left; }
"""


@contextmanager
def expendable(file: Path) -> Iterator[None]:
    """Around what a run can do without: where the disk refuses `file`, that costs a warning and not the run."""
    try:
        yield
    except OSError as error:
        print(f"warning: {file}: {error.strerror or error}; training goes on without it", flush=True)


def write_page(file: Path, title: str, body: str, style: str = "") -> None:
    """Write `body`, HTML whose texts are escaped, below its title; the folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    name = escape(title)
    temporary.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}{style}</style>'
        f"<h1>{name}</h1>{body}</html>\n",
        encoding="utf-8",
    )
    temporary.rename(file)


def picture_tag(picture: Image.Image, name: str, longest_side: int) -> str:
    """An <img> that holds its JPEG."""
    small = picture.copy()
    small.thumbnail((longest_side, longest_side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{content}">'
