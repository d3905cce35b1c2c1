"""What images and texts may be, and what decoding may take: one set for training, evaluation, the library and the page.

Everything here is checked from a file's size and header, before memory is taken. Whatever opens an image goes through
`data_pipeline.images.open_image`, and whatever hands one to a bundle's processor through `eval.prompts.encode`.

| | limit | why |
|---|---|---|
| file | `MAX_BYTES` | is read whole |
| pixels | `MAX_PIXELS` | decoded to RGB they take 400 MB |
| pixels of a kind | `MEMORY_BYTES` over its bytes a pixel | WebP's decoder takes four times as much as PNG's |
| proportions | `MAX_PROPORTION` | the shorter side becomes the model's, so the longer grows with them |
| fitted pixels | `MAX_FITTED_PIXELS` | of the resized image, before the square is cut out |
| decoding at once | `MEMORY_BYTES` | shared by all threads of a process: who finds it taken waits |
| characters of a turn | `MAX_CHARACTERS` | tokenizers and templates copy it several times; no model reads as many |
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from PIL import Image

from models.common.errors import InputError
from models.common.half_characters import half_character

MAX_BYTES = 50_000_000
MAX_PIXELS = 100_000_000
"""A 12-megapixel photograph has an eighth of it."""
MAX_PROPORTION = 200
"""Longer side to shorter side; Qwen2-VL's processor has the same bound."""
MAX_FITTED_PIXELS = 2 * MAX_PIXELS
MEMORY_BYTES = 1_000_000_000
MAX_CHARACTERS = 500_000

_RGB_BYTES = 4
"""Of a pixel of an RGB image, as Pillow keeps it; of one in any other mode at most."""

_DECODER_BYTES: Mapping[str, int] = {"WEBP": 16, "JPEG2000": 20, "AVIF": 12, "HEIF": 12}
"""Bytes a pixel that a decoder takes beside the image, at most; measured (Pillow 12.3). Others read rows: none."""

_PROGRESSIVE_BYTES = 2
"""Bytes a pixel and channel that a progressive JPEG takes, which is decoded as a whole."""


class ImageError(InputError):
    """An image that cannot be read, or is beyond the limits."""


def text_problem(text: str) -> str:
    """Why a turn's text cannot be used; empty where it can."""
    if half := half_character(text):
        return f"holds half of a character ({half}), which no tokenizer takes"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text)} characters; more than {MAX_CHARACTERS} are refused"
    return ""


def check_bytes(num_bytes: int, where: str) -> None:
    """Raise ImageError for a file that is too large to be read."""
    if num_bytes > MAX_BYTES:
        raise ImageError(f"{where} has {num_bytes / 1e6:.0f} MB; more than {MAX_BYTES / 1e6:.0f} MB are refused")


def too_many_pixels(number: str, where: str) -> str:
    """The line about an image of so many pixels."""
    return f"{where} has {number} pixels; more than {MAX_PIXELS} are refused"


def check_size(width: int, height: int, where: str) -> None:
    """Raise ImageError for too many pixels, or too long and thin an image."""
    if width * height > MAX_PIXELS:
        raise ImageError(too_many_pixels(f"{width} x {height}", where))
    if min(width, height) < 1:
        raise ImageError(f"{where} has {width} x {height} pixels: there is nothing to see")
    if max(width, height) > MAX_PROPORTION * min(width, height):
        raise ImageError(
            f"{where} of {width} x {height} pixels is too long and thin; more than {MAX_PROPORTION} : 1 is refused"
        )


def bytes_needed(image: Image.Image) -> int:
    """The most memory that an opened image takes until it is upright and RGB."""
    decoder = _DECODER_BYTES.get(image.format or "", 0)
    if image.info.get("progressive"):
        decoder = _PROGRESSIVE_BYTES * len(image.getbands())
    return image.width * image.height * (_RGB_BYTES + max(_RGB_BYTES, decoder))


def check_decoder(image: Image.Image, where: str) -> None:
    """Raise ImageError for an opened image whose decoder would take more than all of `MEMORY_BYTES`."""
    num_bytes = bytes_needed(image)
    if num_bytes > MEMORY_BYTES:
        raise ImageError(
            f"{where} has {image.width} x {image.height} pixels, to decode which as {image.format} takes"
            f" {num_bytes / 1e9:.1f} GB; at most {MEMORY_BYTES / 1e9:.0f} GB are taken: shrink it, or convert it to PNG"
        )


def check_fitted(width: int, height: int, num_pixels: int) -> None:
    """Raise ImageError where fitting an image to the model's square would make `num_pixels`, too many, on the way."""
    if num_pixels > MAX_FITTED_PIXELS:
        raise ImageError(f"an image of {width} x {height} pixels is too long and thin to be made a square")


class Memory:
    """A number of bytes that threads share. One that asks for more than there is gets all of it, alone."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._num_taken = num_bytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Wait until so much is free, and hold it within the block. Not to be nested."""
        num_bytes = min(num_bytes, self._num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._num_taken + num_bytes <= self._num_bytes)
            self._num_taken += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._num_taken -= num_bytes
                self._changed.notify_all()


MEMORY = Memory(MEMORY_BYTES)
"""What decoding and fitting take together, in this process."""
