"""A decoded image of any mode -> an upright RGB one, in little more memory than the two take.

Owns orientation and colour. Does not own decoding (`data_pipeline.images`).

    alpha, transparent palettes and colours    laid over white
    16- and 32-bit grey                        its upper eight bits
    floating point                             read as [0, 1], or as [0, 255] where it exceeds 1
    CMYK, YCbCr, LAB, palettes                 Pillow's conversion

Strip by strip, since an image with transparency would be there in four modes at once, and grey as doubles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

_STRIP_PIXELS = 1 << 20

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def upright(image: Image.Image, turned: int) -> Image.Image:
    """The image as it is to be seen; itself where it is upright."""
    return image.transpose(_TURNS[turned]) if turned in _TURNS else image


def in_colour(image: Image.Image) -> Image.Image:
    """The image in RGB; itself where it is so already."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image)
    return _over_white(image) if image.has_transparency_data else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    found = Image.new("RGB", image.size)
    for box in _strips(image):
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        found.paste(Image.alpha_composite(white, part).convert("RGB"), box[:2])
    return found


def _grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point grey in eight bits; Pillow's own conversion would clip them to white."""
    largest = max((_numbers(image, box).max(initial=0.0) for box in _strips(image)), default=0.0)
    if image.mode == "F":
        scale = 255.0 if largest <= 1 else 1.0
    else:
        scale = 1 / 256 if image.mode.startswith("I;16") or largest > 255 else 1.0
    found = Image.new("RGB", image.size)
    for box in _strips(image):
        with np.errstate(over="ignore"):  # infinity is white
            eight_bit = np.clip(_numbers(image, box) * scale, 0, 255).astype(np.uint8)
        found.paste(Image.fromarray(eight_bit).convert("RGB"), box[:2])
    return found


def _numbers(image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image.crop(box)).astype(np.float64))


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows, from the top to the bottom."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)
