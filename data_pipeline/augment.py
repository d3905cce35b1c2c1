"""Changes to a training picture, drawn anew each time it is seen: a random cut, a flip, colours.

Owns the random numbers, which are a pure function of (seed, slot, n, place of the picture in its sample): neither
workers nor ranks nor a resumption change them. Does not own fitting; what comes out is a picture like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.config import PictureAugment
from data_pipeline.sample import Draw

_AUGMENT = 4  # named random stream, beside those of `order` and `mixture`
_STRETCH = 4 / 3
"""The cut's proportions differ from the picture's by so much at most (torchvision's RandomResizedCrop: 3/4 to 4/3)."""


class Augmenter:
    """Changes pictures as `PictureAugment` says."""

    def __init__(self, config: PictureAugment, seed: int) -> None:
        self._config = config
        self._seed = seed

    @property
    def smallest_side_share(self) -> float:
        """How much of a picture's shorter side a cut keeps at least."""
        smallest = self._config.crop_area[0]
        return math.sqrt(smallest / min(_STRETCH, 1 / smallest))

    def __call__(self, picture: Image.Image, draw: Draw, place: int) -> Image.Image:
        """The `place`-th picture of the sample of a draw, changed; upright RGB in and out."""
        numbers = uniform(8, self._seed, draw.slot, draw.n, place)
        cut, flip, colours = numbers[:4], numbers[4], numbers[5:]
        picture = picture.crop(_box(picture.size, self._config.crop_area, cut))
        if flip < self._config.flip:
            picture = ImageOps.mirror(picture)
        if self._config.colour:
            for enhance, number in zip(_ENHANCE, colours, strict=True):
                picture = enhance(picture).enhance(1 + self._config.colour * (2 * number - 1))
        return picture


_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def uniform(count: int, *key: int) -> list[float]:
    """`count` numbers in [0, 1) that depend on `key` alone, on any machine (see `order.permutation`)."""
    seed, *rest = key
    words = np.random.Philox(np.random.SeedSequence((seed, _AUGMENT, *rest))).random_raw(count)
    return [int(word >> 11) * 2.0**-53 for word in words]


def _box(size: tuple[int, int], areas: tuple[float, float], numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """A cut of a share of the area, of nearly the picture's proportions, anywhere: (left, top, right, bottom).

    Four uniform numbers choose area, proportions and place. The proportions are bounded so that every share of the area
    finds its cut.
    """
    area, stretch, left, top = numbers
    share = areas[0] + (areas[1] - areas[0]) * area
    widest = math.log(min(_STRETCH, 1 / share))
    ratio = math.exp(widest * (2 * stretch - 1))
    width = max(1, round(size[0] * math.sqrt(share * ratio)))
    height = max(1, round(size[1] * math.sqrt(share / ratio)))
    x, y = int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1))
    return x, y, x + width, y + height
