"""Pictures: any file a person may have -> the uint8 square that the vision encoder takes.

Owns what training and serving must do alike: orientation, colour modes, bombs, fitting. Does not own scaling to
[0, 1] and normalising, which happen on the device.

`open_picture` turns every file into an upright RGB picture:
- EXIF orientation is applied;
- alpha and transparent palettes are laid over white; CMYK, YCbCr and LAB go through Pillow's conversion;
- 16-bit grey keeps its upper eight bits, floating point is read as [0, 1] (or [0, 255] where it exceeds 1);
- of an animation the first frame is taken;
- more than `MAX_PIXELS` is refused from the header, before anything is decoded.

`fit` equals transformers' `CLIPImageProcessorPil` (crop) and `LlavaImageProcessorPil` with `do_pad` (pad, `mean`)
bit for bit before they rescale. No stock processor pads a centred picture with black under a mean that is not black.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from models.errors import InputError
from models.spec import AnyResImage, CropImage, ImageSpec, PadImage

PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "ppm"})
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM")
"""Decoders that may run. Formats that start other programs (EPS) are not among them."""

MAX_PIXELS = 100_000_000
"""A decoded picture of this size takes 300 MB; a 12-megapixel photograph has an eighth."""


class PictureError(InputError):
    """A picture that cannot be read."""


def header_size(stream: BinaryIO) -> tuple[int, int]:
    """(width, height) as the file's header says, before orientation; (0, 0) where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as picture:
                return picture.size
    except Exception:  # decoders raise anything on hostile bytes; the reader will name the sample
        return 0, 0


def open_picture(source: bytes | Path | str, *, at_least: int | None = None) -> Image.Image:
    """Decode a file or its bytes to an upright RGB picture, as the module's docstring says.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps so many pixels,
            which is several times faster and changes pixels; docs/data.md says by how much.

    Raises:
        PictureError: not a picture, damaged, cut short, or larger than `MAX_PIXELS`.
    """
    where = "picture" if isinstance(source, bytes) else str(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as picture:
                _refuse_bomb(picture, where)
                if at_least is not None:
                    picture.draft(None, (at_least, at_least))
                picture.seek(0)
                picture.load()
                return to_rgb(picture)
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"no picture at {where}") from None
    except Exception as error:  # decoders raise anything on hostile bytes: struct.error, SyntaxError, ValueError …
        raise PictureError(f"{where} cannot be decoded: {type(error).__name__}: {_one_line(error)}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """A decoded picture, upright and in RGB: what `open_picture` makes of a file."""
    return _to_rgb(_upright(picture))


def _refuse_bomb(picture: Image.Image, where: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{where} has {width} x {height} pixels; more than {MAX_PIXELS} are refused")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _upright(picture: Image.Image) -> Image.Image:
    """Apply EXIF orientation; a damaged EXIF block says nothing."""
    try:
        is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if is_turned else picture
    except Exception:
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _deep_grey(picture)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _deep_grey(picture: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point grey to eight bits; Pillow's own conversion would clip them to white."""
    values = np.nan_to_num(np.asarray(picture).astype(np.float64))
    if picture.mode == "F":
        eight_bit = values * 255 if values.max(initial=0.0) <= 1 else values
    else:
        is_deep = picture.mode.startswith("I;16") or values.max(initial=0.0) > 255
        eight_bit = values // 256 if is_deep else values
    return Image.fromarray(np.clip(eight_bit, 0, 255).astype(np.uint8)).convert("RGB")


def fit(picture: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """An RGB picture as one square [S, S, 3], by the rule of `spec.fit`; several tiles are `tiles.fit_tiles`'s.

    Raises:
        PictureError: so long and thin that the fitted picture would not fit into memory.
    """
    assert not isinstance(spec.fit, AnyResImage), "AnyRes makes several squares"
    if isinstance(spec.fit, CropImage):
        return _crop(picture, spec.size)
    return _pad(picture, spec.size, pad_colour(spec.fit, spec.mean))


def pad_colour(rule: PadImage, mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Colour of the padding, eight bits a channel, rounded down as LLaVA does."""
    if rule.colour == "black":
        return 0, 0, 0
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def _crop(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Shorter side to `size` (the longer rounded down), then the central square.

    What is cut off is not computed where Pillow allows that without changing a bit.
    """
    width, height = picture.size
    new_long = int(size * max(width, height) / min(width, height))
    _refuse_thread(picture, size * new_long)
    start = (new_long - size) // 2
    first, end = exact_window(start, start + size, max(width, height), new_long)
    scale = max(width, height) / new_long
    skip = slice(start - first, start - first + size)
    if width <= height:
        box: tuple[float, float, float, float] = (0, first * scale, width, end * scale)
        return np.asarray(picture.resize((size, end - first), Image.Resampling.BICUBIC, box))[skip]
    box = (first * scale, 0, end * scale, height)
    return np.asarray(picture.resize((end - first, size), Image.Resampling.BICUBIC, box))[:, skip]


def exact_window(start: int, end: int, length: int, new_length: int) -> tuple[int, int]:
    """The smallest range around [start, end) of a resized side whose edges Pillow's `box` can express exactly.

    Pillow takes the box in single precision: an edge that is not a dyadic fraction of the source would shift every
    filter by a hair and change pixels by one. 640 x 480 needs nothing around; a side that shares no factor needs all.
    """
    step = new_length // math.gcd(length, new_length)
    step //= step & -step  # powers of two cost nothing
    first, last = start - start % step, min(end + -end % step, new_length)
    edges = np.array([first, last]) * (length / new_length)
    return (first, last) if np.array_equal(edges.astype(np.float32), edges) else (0, new_length)


def _pad(picture: Image.Image, size: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Centre on a square of `colour`, then resize to `size`."""
    width, height = picture.size
    side = max(width, height)
    _refuse_thread(picture, side * side)
    if width != height:
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def _refuse_thread(picture: Image.Image, num_pixels: int) -> None:
    if num_pixels > 2 * MAX_PIXELS:
        width, height = picture.size
        raise PictureError(f"a picture of {width} x {height} pixels is too long and thin to be made a square")
