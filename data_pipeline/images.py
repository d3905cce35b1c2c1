"""Images: any image file -> the uint8 square that the vision encoder takes.

Owns what training and serving must do in the same way: orientation, colour modes, decompression bombs, fitting. Does
not own scaling to [0, 1] and normalising, which happen on the device.

`open_image` turns every file into an upright RGB image:
- EXIF orientation is applied, and colours become RGB (`data_pipeline.colours`);
- of an animation the first frame is taken;
- what is beyond `data_pipeline.limits` is refused from the header, before anything is decoded.

`fit` equals transformers' `CLIPImageProcessorPil` (crop) and `LlavaImageProcessorPil` with `do_pad` (pad, `mean`)
bit for bit before they rescale. No stock processor pads a centred image with black under a mean that is not black.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_pipeline import limits
from data_pipeline.colours import in_colour, orientation, upright
from data_pipeline.image_kinds import IMAGE_EXTENSIONS, cannot_be_read, image_kind
from data_pipeline.limits import ImageError
from models.common.errors import single_line
from models.spec import ImageSpec

__all__ = ["FORMATS", "IMAGE_EXTENSIONS", "ImageError", "check_header", "fit", "header_size", "open_image", "to_rgb"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM")
"""Decoders that may run. Formats that start other programs (EPS) are not among them."""

_VERTICAL_FIRST = 100
"""Beyond this ratio of height to width Pillow may resize vertically first, which rounds differently; whether it does so
depends on the window that is asked for (https://github.com/python-pillow/Pillow/pull/9524). So such an image is
resized.
"""

_STRIP_PIXELS = 1 << 20
"""Pixels of a padded square at a time."""


@cache
def has_heic() -> bool:
    """Whether pillow-heif is installed; it is then told to Pillow."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    register_heif_opener()
    return True


def _formats() -> tuple[str, ...]:
    return (*FORMATS, "HEIF") if has_heic() else FORMATS


def _head(source: bytes | Path | str) -> bytes:
    if isinstance(source, bytes):
        return source[:32]
    with Path(source).open("rb") as stream:
        return stream.read(32)


def _looks_like(head: bytes) -> str:
    """What a file that no decoder takes looks like."""
    if not head:
        return "it is empty"
    if kind := image_kind(head):
        return f"it begins like {kind.upper()} and goes on like nothing known"
    if head.lstrip()[:1] == b"<":
        return "it is a page of HTML or XML, not an image"
    return f"it is no image of a known kind; it begins with {head[:12]!r}"


def header_size(stream: BinaryIO) -> tuple[int, int]:
    """(width, height) from the file's header, before orientation; (0, 0) where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=_formats()) as image:
                return image.size
    except Exception:  # decoders may raise any exception on malformed bytes; the reader will name the sample
        return 0, 0


def open_image(source: bytes | Path | str, *, at_least: int | None = None) -> Image.Image:
    """Decode a file or its bytes to an upright RGB image, as described in the module's docstring.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps so many pixels,
            which is several times faster and changes pixels; docs/data.md gives the size of the change.

    Raises:
        ImageError: not an image, damaged, cut short, or beyond `data_pipeline.limits`.
    """
    with _opened(source) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        with limits.MEMORY.taken(limits.bytes_needed(image)):
            image.seek(0)
            image.load()
            turned, found = orientation(image), in_colour(image)
            if found is not image:
                image.close()  # of a large image a turned copy is made next
            return upright(found, turned)


def check_header(source: bytes | Path | str) -> tuple[int, int]:
    """Raise ImageError, as `open_image` would, for what a file's size and header say; nothing is decoded.

    Returns:
        Its pixels, and the bytes that `open_image` takes for it at most.
    """
    with _opened(source) as image:
        return image.width * image.height, limits.bytes_needed(image)


@contextmanager
def _opened(source: bytes | Path | str) -> Iterator[Image.Image]:
    """The image of a file within the limits, not yet decoded; whatever opening or decoding raises is an ImageError."""
    where = "image" if isinstance(source, bytes) else str(source)
    try:
        limits.check_bytes(len(source) if isinstance(source, bytes) else Path(source).stat().st_size, where)
        head = _head(source)
        if reason := cannot_be_read(head, heic=has_heic()):
            raise ImageError(f"{where} is {reason}")
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=_formats()) as image:
                limits.check_size(*image.size, where)
                limits.check_decoder(image, where)
                yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"no image at {where}") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, which is looked at first, and is a higher one
        found = re.search(r"\d+", str(error))
        raise ImageError(limits.too_many_pixels(found[0] if found else "too many", where)) from None
    except UnidentifiedImageError:  # its own message is the address of a buffer
        raise ImageError(f"{where} cannot be decoded: {_looks_like(head)}") from None
    except Exception as error:  # decoders raise anything on malformed bytes: struct.error, SyntaxError, ValueError …
        raise ImageError(f"{where} cannot be decoded: {type(error).__name__}: {single_line(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image, upright and in RGB, as `open_image` returns it."""
    return upright(in_colour(image), orientation(image))


def fit(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """An RGB image as one square [S, S, 3], by the rule of `spec.fit`; for several tiles use `tiles.fit_tiles`.

    Raises:
        ImageError: so long and thin that the fitted image would not fit into memory.
    """
    assert not spec.fit.is_tiled, "AnyRes makes several squares"
    if spec.fit.kind == "stretch":
        return np.asarray(image.resize((spec.size, spec.size), Image.Resampling.BICUBIC))
    colour = spec.fit.padding(spec.mean)
    return _crop(image, spec.size) if colour is None else _pad(image, spec.size, colour)


def _crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Shorter side to `size` (the longer rounded down), then the central square.

    The part that is cropped away is not computed where Pillow can skip it without changing a bit.
    """
    width, height = image.size
    new_long = int(size * max(width, height) / min(width, height))
    limits.check_fitted(width, height, size * new_long)
    start = (new_long - size) // 2
    first, end = exact_window(start, start + size, max(width, height), new_long)
    if height > _VERTICAL_FIRST * width:
        first, end = 0, new_long
    scale = max(width, height) / new_long
    skip = slice(start - first, start - first + size)
    if width <= height:
        box: tuple[float, float, float, float] = (0, first * scale, width, end * scale)
        return np.asarray(image.resize((size, end - first), Image.Resampling.BICUBIC, box))[skip]
    box = (first * scale, 0, end * scale, height)
    return np.asarray(image.resize((end - first, size), Image.Resampling.BICUBIC, box))[:, skip]


def exact_window(start: int, end: int, length: int, new_length: int) -> tuple[int, int]:
    """The smallest range around [start, end) of a resized side whose edges Pillow's `box` can express exactly.

    Pillow takes the box in single precision: an edge that is not a dyadic fraction of the source would shift every
    filter slightly and change pixels by one. 640 x 480 needs no margin. A side that shares no factor with its resized
    length needs the whole side.
    """
    step = new_length // math.gcd(length, new_length)
    step //= step & -step  # powers of two cost nothing
    first, last = start - start % step, min(end + -end % step, new_length)
    edges = np.array([first, last]) * (length / new_length)
    return (first, last) if np.array_equal(edges.astype(np.float32), edges) else (0, new_length)


def _pad(image: Image.Image, size: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Centre on a square of `colour`, then resize to `size`.

    Pillow resizes the rows of a square, then its columns. So the square itself, of a long image far larger than the
    image, need not be made: rows of the image, padded, are resized a strip at a time.
    """
    side = max(image.size)
    limits.check_fitted(*image.size, size * side)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    columns = Image.new("RGB", (size, side), colour)
    for start in range(0, image.height, rows := max(1, _STRIP_PIXELS // side)):
        end = min(start + rows, image.height)
        strip = Image.new("RGB", (side, end - start), colour)
        strip.paste(image.crop((0, start, image.width, end)), (left, 0))
        columns.paste(strip.resize((size, end - start), Image.Resampling.BICUBIC), (0, top + start))
    return np.asarray(columns.resize((size, size), Image.Resampling.BICUBIC))
