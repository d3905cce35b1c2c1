"""A picture as the tiles that the vision encoder takes: one square, or LLaVA-NeXT's several (AnyRes).

Owns the cut into tiles. Which canvas a picture gets, and what it costs in tokens, is `models.spec`'s.

    picture -> the whole of it on one square, its proportions given up                        tile 0
            -> its proportions kept, centred on a black canvas of a x b squares, cut up       tiles 1 … a*b, row by row

Equals transformers' `LlavaNextImageProcessorPil` bit for bit before it rescales.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from data_pipeline.images import fit
from data_pipeline.sample import TileArray
from models.spec import AnyResImage, ImageSpec, canvas_size


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
