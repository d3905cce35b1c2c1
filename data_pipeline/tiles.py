"""A picture as the tiles that the vision encoder takes: one square, or LLaVA-NeXT's several (AnyRes).

Owns the cut into tiles, and shrinking pictures to a budget of tokens. Which canvas a picture gets, and what it costs in
tokens, is `models.spec`'s.

    picture -> the whole of it on one square, its proportions given up                        tile 0
            -> its proportions kept, centred on a black canvas of a x b squares, cut up       tiles 1 … a*b, row by row

Equals transformers' `LlavaNextImageProcessorPil` bit for bit before it rescales. A picture that is to have fewer tiles
is shrunk to what a smaller canvas holds: canvas and cost follow from its size as ever, and nothing else needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.images import fit
from data_pipeline.sample import TileArray
from models.spec import AnyResImage, ImageSpec, canvas_size, num_image_tokens


def fit_tiles(picture: Image.Image, spec: ImageSpec) -> TileArray:
    """An RGB picture as tiles [T, S, S, 3], by the rule of `spec.fit`; T is 1 but for AnyRes.

    Raises:
        InputError: too long and thin.
    """
    if not isinstance(spec.fit, AnyResImage):
        return fit(picture, spec)[np.newaxis]
    size = spec.size
    height, width = canvas_size(spec, picture.width, picture.height)
    whole = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    grid = _on_canvas(picture, width, height).reshape(height // size, size, width // size, size, 3)
    return np.concatenate([whole[np.newaxis], grid.swapaxes(1, 2).reshape(-1, size, size, 3)])


def _on_canvas(picture: Image.Image, width: int, height: int) -> TileArray:
    """The picture as large as it fits, centred on black: [height, width, 3]."""
    scale_x, scale_y = width / picture.width, height / picture.height
    if scale_x < scale_y:
        size = width, min(math.ceil(picture.height * scale_x), height)
    else:
        size = min(math.ceil(picture.width * scale_y), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def shrink_to_budget(pictures: Sequence[Image.Image], spec: ImageSpec, budget: int) -> tuple[list[Image.Image], int]:
    """Pictures that together cost at most `budget` tokens, and how many of them were shrunk for it.

    As long as they cost more, the costliest (the first where two tie) goes to its next smaller canvas, so a single
    picture gets the largest that fits. Where the smallest canvases cost too much, too, they come back all the same.

    Raises:
        InputError: a picture that no canvas takes.
    """
    options = [canvas_options(spec, picture.width, picture.height) for picture in pictures]
    taken = [0] * len(pictures)
    while sum(option[place][0] for option, place in zip(options, taken, strict=True)) > budget:
        movable = [number for number, option in enumerate(options) if taken[number] + 1 < len(option)]
        if not movable:
            break
        taken[max(movable, key=lambda number: (options[number][taken[number]][0], -number))] += 1
    shrunk = [
        picture.resize(option[place][1], Image.Resampling.BICUBIC) if place else picture
        for picture, option, place in zip(pictures, options, taken, strict=True)
    ]
    return shrunk, sum(place > 0 for place in taken)


def canvas_options(spec: ImageSpec, width: int, height: int) -> list[tuple[int, tuple[int, int]]]:
    """(tokens, (width, height)) of a picture as it is, then shrunk to each smaller canvas, the dearest first."""
    assert isinstance(spec.fit, AnyResImage), "only AnyRes has a canvas"
    whole = num_image_tokens(spec, width, height)
    found: dict[int, tuple[int, int]] = {}
    for canvas_height, canvas_width in spec.fit.pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        size = int(width * scale), int(height * scale)
        if scale < 1 and min(size) > 0 and (tokens := num_image_tokens(spec, *size)) < whole:
            found[tokens] = max(found.get(tokens, size), size)
    return [(whole, (width, height)), *sorted(found.items(), reverse=True)]
