"""Large images through a stock processor: it makes the pixels that it would make, without copies of the whole image.

Owns which images are large, and what their processing takes. Which images are taken at all is `data_pipeline.limits`'s.

    one square           -> the square that the processor would make, which passes through it unchanged
    tiles, patches       -> stock code gets a stand-in for the image's array; Pillow resizes the image itself
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline import limits
from data_pipeline.images import fit, to_rgb
from models.spec import CropImage, ImageSpec, PadImage

_LARGE_PIXELS = 1 << 24
"""Of an image, or of the square that it is padded to: more are not left to the processor."""

_STOCK_BYTES = 16
"""Bytes a pixel that a stock processor takes: the image as an array, and as an image again."""


def affordable(image_processor: Any, image: Image.Image) -> Image.Image:
    """The image, or of a large one the square that the processor makes of it: stock code copies it whole several times.

    `data_pipeline.images.fit` makes the same square, bit for bit, and a square of that size passes unchanged.

    Raises:
        ImageError: where training does.
    """
    limits.check_size(*image.size, "an image")
    pads = bool(getattr(image_processor, "do_pad", False))
    side = (getattr(image_processor, "size", None) or {}).get("shortest_edge")
    crop = getattr(image_processor, "crop_size", None) or {}
    num_pixels = max(image.size) ** 2 if pads else image.width * image.height
    is_square = [crop.get(name) for name in ("height", "width")] == [side, side]
    if side is None or num_pixels <= _LARGE_PIXELS or not is_square or _resizes_alone(image_processor):
        return image
    mean, std = _three(image_processor.image_mean), _three(image_processor.image_std)
    spec = ImageSpec(size=side, patch_size=side, fit=PadImage() if pads else CropImage(), mean=mean, std=std)
    return Image.fromarray(fit(to_rgb(image), spec))


def bytes_needed(image_processor: Any, image: Image.Image) -> int:
    """What processing an image takes beside itself, at most."""
    num_pixels = image.width * image.height
    return 0 if num_pixels > _LARGE_PIXELS and _resizes_alone(image_processor) else _STOCK_BYTES * num_pixels


def without_copies(processor: Any) -> Any:
    """The processor, or where its images may be large one that shares all with it and copies none of them."""
    if not _resizes_alone(processor.image_processor):
        return processor
    light, images = copy.copy(processor), copy.copy(processor.image_processor)
    stock: Any = type(images)
    images.__class__ = _without_copies(stock)
    light.image_processor = images
    return light


def _resizes_alone(image_processor: Any) -> bool:
    """Whether Pillow's resizing is all that the processor does with a whole image: tiles or patches are cut later."""
    from transformers.image_processing_backends import PilBackend

    is_cut = hasattr(image_processor, "image_grid_pinpoints") or hasattr(image_processor, "merge_size")
    return is_cut and isinstance(image_processor, PilBackend) and bool(image_processor.do_resize)


@dataclass(frozen=True)
class _StandIn:
    """An image in the place of its array [3, H, W], of which stock code may ask the shape and nothing else."""

    image: Image.Image

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, self.image.height, self.image.width


@cache
def _without_copies(stock: Any) -> type:
    """`stock` with what it does to a whole image done by Pillow, where that is large."""
    from transformers.image_processing_backends import PilBackend

    class Resizing(PilBackend):
        """Between `stock`, which may choose another size first, and its base."""

        def process_image(self, image: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(image, Image.Image) and image.width * image.height > _LARGE_PIXELS:
                return _StandIn(image if image.mode == "RGB" else to_rgb(image))
            return super().process_image(image, *arguments, **options)

        def resize(self, image: Any, size: Any, resample: Any = None, **options: Any) -> Any:
            if not isinstance(image, _StandIn):
                return super().resize(image, size, resample, **options)
            return _channels_first(image.image.resize((size.width, size.height), resample))

    class Padding(stock, Resizing):
        """In front of `stock`, which pads each of several images."""

        def pad_to_square(self, image: Any, background_color: Any = 0) -> Any:
            if not isinstance(image, _StandIn):
                return super().pad_to_square(image, background_color)
            side = self.size["height"]
            spec = ImageSpec(size=side, patch_size=side, fit=PadImage(), mean=_three(self.image_mean), std=(1.0,) * 3)
            return np.moveaxis(fit(image.image, spec), -1, 0)

    return Padding


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.moveaxis(np.asarray(image), -1, 0)


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
