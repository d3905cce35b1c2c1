"""An image as the tiles that the vision encoder takes: one square, LLaVA-NeXT's several (AnyRes), or its patches.

Owns the cut into tiles, and shrinking images to a budget of tokens. Which canvas an image gets, and what it costs in
tokens, is `models.spec`'s.

    image -> the whole of it on one square, its proportions given up                        tile 0
            -> its proportions kept, centred on a black canvas of a x b squares, cut up       tiles 1 … a*b, row by row

Equals transformers' `LlavaNextImageProcessorPil` bit for bit before it rescales. An image that must have fewer tiles is
shrunk to fit a smaller canvas: canvas and cost follow from its new size as for any other image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline import limits
from data_pipeline.images import fit
from data_pipeline.sample import TileArray
from models.patches import in_blocks
from models.spec import WHOLE, ImageSizes, ImageSpec, NativeImage, PadImage, PatchGrid, canvas_size, num_image_tokens


def fit_tiles(image: Image.Image, spec: ImageSpec) -> TileArray:
    """An RGB image as tiles [T, S, S, 3], by the rule of `spec.fit`; T is 1 but for AnyRes and native resolution.

    Raises:
        InputError: too long and thin.
    """
    if spec.fit.grid is not None:
        return cut_patches(image, spec.fit.fitted(image.width, image.height), spec.fit.grid)
    if not spec.fit.is_tiled:
        return fit(image, spec)[np.newaxis]
    size = spec.size
    height, width = canvas_size(spec, image.width, image.height)
    whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    grid = _on_canvas(image, width, height).reshape(height // size, size, width // size, size, 3)
    return np.concatenate([whole[np.newaxis], grid.swapaxes(1, 2).reshape(-1, size, size, 3)])


def cut_patches(image: Image.Image, size: tuple[int, int], grid: PatchGrid) -> TileArray:
    """An RGB image, resized to `size` (height, width), as its patches [P, S, S, 3], block after block.

    Raises:
        ImageError: it would not fit into memory.
    """
    height, width = size
    limits.check_fitted(*image.size, height * width)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = grid.patches(height, width)
    side = grid.patch_size
    return in_blocks(pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2), grid.merge)


def joined_patches(patches: TileArray, sizes: ImageSizes, grid: PatchGrid) -> Iterator[TileArray]:
    """The images [height, width, 3] of the patches [P, S, S, 3] that `cut_patches` made: its inverse."""
    start = 0
    for height, width in sizes:
        (rows, columns), merge = grid.patches(height, width), grid.merge
        own = patches[start : start + rows * columns]
        blocks = own.reshape(rows // merge, columns // merge, merge, merge, *own.shape[1:]).swapaxes(1, 2)
        yield blocks.reshape(rows, columns, *own.shape[1:]).swapaxes(1, 2).reshape(height, width, 3)
        start += rows * columns


class FittedImage(NamedTuple):
    """An image as the model takes it."""

    tiles: TileArray  # [T, S, S, 3]
    size: tuple[int, int]
    """(height, width): its own, WHOLE, or at native resolution that to which it is resized."""
    num_tokens: int


def fit_image(image: Image.Image, spec: ImageSpec) -> FittedImage:
    """An RGB image as tiles, with its size and what it costs. Raises InputError where it is too long and thin."""
    size = (image.height, image.width)
    if spec.fit.grid is not None:
        size = spec.fit.fitted(image.width, image.height)
    return FittedImage(fit_tiles(image, spec), size, num_image_tokens(spec, image.width, image.height))


def fit_whole(image: Image.Image, spec: ImageSpec) -> FittedImage:
    """An RGB image as one square alone, padded with the mean, as LLaVA-OneVision's processor makes it of several."""
    square = spec.model_copy(update={"fit": PadImage(colour="mean")})
    return FittedImage(fit(image, square)[np.newaxis], WHOLE, num_image_tokens(spec, *WHOLE))


def fit_to_budget(images: Sequence[Image.Image], spec: ImageSpec, budget: int) -> tuple[list[FittedImage], int]:
    """Images that together cost at most `budget` tokens, and how many of them were shrunk for it.

    Under AnyRes by `shrink_to_budget`. At native resolution all images get the same largest area that fits, of at least
    its lower bound; each is resized once. Where even that costs too much, they are returned as they are.
    """
    if spec.fit.grid is None:
        shrunk, num_shrunk = shrink_to_budget(images, spec, budget)
        return [fit_image(image, spec) for image in shrunk], num_shrunk
    most = most_pixels([image.size for image in images], spec.fit, budget)
    smaller = spec.model_copy(update={"fit": spec.fit.model_copy(update={"max_pixels": most})})
    fitted = [fit_image(image, smaller) for image in images]
    return fitted, sum(each.size != spec.fit.fitted(*image.size) for each, image in zip(fitted, images, strict=True))


def most_pixels(sizes: Sequence[tuple[int, int]], fit: NativeImage, budget: int) -> int:
    """The largest bound of pixels under which images of these (width, height) cost at most `budget` tokens.

    A multiple of one token's, at least the lower bound; `fit`'s own where it fits, and where nothing does.
    """

    def cost(num_tokens: int) -> int:
        bound = num_tokens * fit.grid.factor**2
        return sum(fit.num_tokens(*fit.fitted(*size, max_pixels=bound)) for size in sizes)

    per_token = fit.grid.factor**2
    low, high = -(-fit.min_pixels // per_token), fit.max_pixels // per_token
    if cost(high) <= budget or cost(low) > budget:
        return fit.max_pixels
    while high - low > 1:  # cost(low) fits and cost(high) does not
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low * per_token


def _on_canvas(image: Image.Image, width: int, height: int) -> TileArray:
    """The image as large as it fits, centred on black: [height, width, 3]."""
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        size = width, min(math.ceil(image.height * scale_x), height)
    else:
        size = min(math.ceil(image.width * scale_y), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def shrink_to_budget(images: Sequence[Image.Image], spec: ImageSpec, budget: int) -> tuple[list[Image.Image], int]:
    """Images that together cost at most `budget` tokens, and how many of them were shrunk for it.

    While they cost more, the most expensive image (the first of equals) gets its next smaller canvas, so a single image
    gets the largest that fits. If even the smallest canvases cost too much, the images are returned anyway.

    Raises:
        InputError: an image that no canvas takes.
    """
    options = [canvas_options(spec, image.width, image.height) for image in images]
    taken = [0] * len(images)
    while sum(option[place][0] for option, place in zip(options, taken, strict=True)) > budget:
        movable = [number for number, option in enumerate(options) if taken[number] + 1 < len(option)]
        if not movable:
            break
        taken[max(movable, key=lambda number: (options[number][taken[number]][0], -number))] += 1
    shrunk = [
        image.resize(option[place][1], Image.Resampling.BICUBIC) if place else image
        for image, option, place in zip(images, options, taken, strict=True)
    ]
    return shrunk, sum(place > 0 for place in taken)


def canvas_options(spec: ImageSpec, width: int, height: int) -> list[tuple[int, tuple[int, int]]]:
    """(tokens, (width, height)) of an image as it is, then shrunk to each smaller canvas, the most expensive first."""
    assert spec.fit.is_tiled, "only AnyRes has a canvas"
    whole = num_image_tokens(spec, width, height)
    found: dict[int, tuple[int, int]] = {}
    for canvas_height, canvas_width in spec.fit.pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        size = int(width * scale), int(height * scale)
        if scale < 1 and min(size) > 0 and (tokens := num_image_tokens(spec, *size)) < whole:
            found[tokens] = max(found.get(tokens, size), size)
    return [(whole, (width, height)), *sorted(found.items(), reverse=True)]
