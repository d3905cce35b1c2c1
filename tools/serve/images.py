"""Images on their way to the page: uploads, addresses and examples, checked before anything is decoded.

Owns what a browser can show. Does not own limits (data_pipeline.limits), decoding (data_pipeline.images) or the web
(tools.serve.fetch).
"""

from __future__ import annotations

import io
import secrets
from pathlib import Path

from data_pipeline.images import IMAGE_EXTENSIONS, open_image
from data_pipeline.limits import check_bytes
from models.common.errors import InputError

_SHOWN_BY_BROWSERS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"})


def check_image(path: Path) -> None:
    """Raise InputError, in one line, unless `path` is an image within the limits."""
    try:
        check_bytes(path.stat().st_size, "the file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"the image is not here any more ({error.strerror}): give it once more") from error
    try:
        open_image(data)
    except InputError as error:
        raise InputError(f"this file is no image that can be read: {error}") from error


def showable(path: Path, folder: Path) -> Path:
    """`path` itself, or for a format that browsers do not show, a PNG of the same pixels in `folder`."""
    if path.suffix.lower() in _SHOWN_BY_BROWSERS:
        return path
    png = folder / f"{secrets.token_hex(16)}.png"  # nothing of a visitor's is called as another could have it called
    open_image(path).save(png)
    return png


def keep(data: bytes, folder: Path) -> Path:
    """Write fetched bytes into `folder`, once they are known to be an image, under a name with its format."""
    from PIL import Image

    path = folder / secrets.token_hex(16)
    path.write_bytes(data)
    try:
        check_image(path)
    except InputError:
        path.unlink()
        raise
    with Image.open(io.BytesIO(data)) as image:
        suffix = {"JPEG": ".jpg", "MPO": ".jpg"}.get(str(image.format), f".{str(image.format).lower()}")
    return path.rename(path.with_suffix(suffix))


def find_examples(folder: Path, limit: int = 12) -> list[Path]:
    """The first `limit` images in `folder`, by name. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: --examples takes a folder of images")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not found:
        raise InputError(f"{folder} holds no images: --examples takes a folder of images")
    return found[:limit]
