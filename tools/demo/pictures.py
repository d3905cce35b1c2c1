"""Pictures on their way to the page: uploads, addresses and examples, checked before anything is decoded.

Owns the limits of the page and what a browser can show. Does not own decoding (data_pipeline.images) or the web
(tools.demo.fetch).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from data_pipeline.images import PICTURE_EXTENSIONS, header_size, open_picture
from models.errors import InputError

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
"""A little more than a large camera's picture; decoded it takes 150 MB."""

_SHOWN_BY_BROWSERS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"})


def check_picture(path: Path) -> None:
    """Raise InputError, in one line, unless `path` is a picture within the page's limits."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else None
    except OSError as error:
        raise InputError(f"the picture is not here any more ({error.strerror}): give it once more") from error
    if data is None:
        raise InputError(f"the file has {size / 1e6:.0f} MB: take one of at most {MAX_BYTES / 1e6:.0f} MB")
    width, height = header_size(io.BytesIO(data))
    if width * height > MAX_PIXELS:
        raise InputError(f"the picture has {width} x {height} pixels: take at most {MAX_PIXELS / 1e6:.0f} million")
    try:
        open_picture(data)
    except InputError as error:
        raise InputError(f"this file is no picture that can be read: {error}") from error


def showable(path: Path, folder: Path) -> Path:
    """`path` itself, or where no browser shows its format, a PNG of the same pixels in `folder`."""
    if path.suffix.lower() in _SHOWN_BY_BROWSERS:
        return path
    png = folder / f"{path.stem}.png"
    open_picture(path).save(png)
    return png


def keep(data: bytes, folder: Path) -> Path:
    """Write fetched bytes into `folder`, once they are known to be a picture, under a name that says its format."""
    from PIL import Image

    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    try:
        check_picture(path)
    except InputError:
        path.unlink()
        raise
    with Image.open(io.BytesIO(data)) as picture:
        suffix = {"JPEG": ".jpg", "MPO": ".jpg"}.get(str(picture.format), f".{str(picture.format).lower()}")
    return path.rename(path.with_suffix(suffix))


def find_examples(folder: Path, limit: int = 12) -> list[Path]:
    """The first `limit` pictures in `folder`, by name. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: --examples takes a folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in PICTURE_EXTENSIONS)
    if not found:
        raise InputError(f"{folder} holds no pictures: --examples takes a folder of pictures")
    return found[:limit]
