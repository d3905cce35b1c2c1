"""Augmentation of a training image, drawn anew each time it is seen: a random crop, a flip, colours.

Owns the random numbers, which are a pure function of (seed, slot, n, place of the image in its sample): the numbers of
workers and ranks, and resuming, do not change them. Does not own fitting; what comes out is an image like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.config import ImageAugment
from data_pipeline.sample import SampleRef

_AUGMENT = 4  # named random stream, distinct from those of `order` and `mixture`
_STRETCH = 4 / 3
"""Largest change of the crop's aspect ratio relative to the image's (torchvision's RandomResizedCrop: 3/4 to 4/3)."""


class Augmenter:
    """Changes images as `ImageAugment` says."""

    def __init__(self, config: ImageAugment, seed: int) -> None:
        self._config = config
        self._seed = seed

    @property
    def smallest_side_share(self) -> float:
        """The smallest share of an image's shorter side that a crop keeps."""
        smallest = self._config.crop_area[0]
        return math.sqrt(smallest / min(_STRETCH, 1 / smallest))

    def __call__(self, image: Image.Image, ref: SampleRef, place: int) -> Image.Image:
        """The `place`-th image of a sample, changed; upright RGB in and out."""
        numbers = uniform(8, self._seed, ref.slot, ref.n, place)
        cut, flip, colours = numbers[:4], numbers[4], numbers[5:]
        image = image.crop(_box(image.size, self._config.crop_area, cut))
        if flip < self._config.flip:
            image = ImageOps.mirror(image)
        if self._config.colour:
            for enhance, number in zip(_ENHANCE, colours, strict=True):
                image = enhance(image).enhance(1 + self._config.colour * (2 * number - 1))
        return image


_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def uniform(count: int, *key: int) -> list[float]:
    """`count` numbers in [0, 1) that depend on `key` alone, on any machine (see `order.permutation`)."""
    seed, *rest = key
    words = np.random.Philox(np.random.SeedSequence((seed, _AUGMENT, *rest))).random_raw(count)
    return [int(word >> 11) * 2.0**-53 for word in words]


def _box(size: tuple[int, int], areas: tuple[float, float], numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """A random crop with nearly the image's aspect ratio: (left, top, right, bottom).

    Four uniform numbers choose area, aspect ratio and position. The aspect ratio is bounded so that every share of the
    area has a crop.
    """
    area, stretch, left, top = numbers
    share = areas[0] + (areas[1] - areas[0]) * area
    widest = math.log(min(_STRETCH, 1 / share))
    ratio = math.exp(widest * (2 * stretch - 1))
    width = max(1, round(size[0] * math.sqrt(share * ratio)))
    height = max(1, round(size[1] * math.sqrt(share / ratio)))
    x, y = int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1))
    return x, y, x + width, y + height
