"""AnyRes in the model: maps tile features to the positions of an image's tokens (LLaVA-NeXT).

    tile 0, the whole image           its P features as they come
    tiles 1 … a*b, parts of the canvas  put together again to rows of patches, the padding around the image cut off,
                                        and behind each row the newline, a vector that is trained with the projector

An image that is `WHOLE` has tile 0 and one newline.

Equals transformers' `LlavaNextModel.pack_image_features`; LLaVA calls it `spatial_unpad`. Canvas and unpadded grid are
those of `models.spec`, which counts the tokens. P features a tile, D the language model's width, F features of all
tiles, I image tokens of all images, R rows and C columns of patches.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spec import WHOLE, ImageFit, ImageSizes, ImageSpec, canvas_size, shrunk_grid, unpadded_grid


class NewLine(nn.Module):
    """The trained vector [D] after each row of patches: LLaVA-NeXT's `image_newline`, with its initial values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, features_FD: Tensor) -> Tensor:
        """The features followed by the newline, [F + 1, D]."""
        return torch.cat([features_FD, self.weight.to(features_FD.dtype).unsqueeze(0)])


def with_newline(projector: nn.Module, fit: ImageFit, language_width: int) -> nn.Module:
    """The projector; under AnyRes with its newline vector, which is trained, saved and merged as part of it."""
    if fit.is_tiled:
        projector.newline = NewLine(language_width)
    return projector


def arrangement(spec: ImageSpec, image_sizes: ImageSizes) -> Tensor:
    """The index of each image token's feature, int64 [I]: in the F features of all tiles, or F for the newline.

    `image_sizes` are (height, width) of the images before resizing, in their order.
    """
    parts = [_of_image(spec, height, width) for height, width in image_sizes]
    per_tile = (spec.size // spec.patch_size) ** 2
    num_features = per_tile * sum(num_tiles for _, num_tiles in parts)
    start, places = 0, []
    for local_I, num_tiles in parts:
        places.append(torch.where(local_I < 0, num_features, local_I + start))
        start += per_tile * num_tiles
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)


def shrink(spec: ImageSpec, features_ID: Tensor, image_sizes: ImageSizes) -> Tensor:
    """Arranged features with fewer rows and columns where an image has too many (LLaVA-OneVision's `anyres_max_9`).

    Equals transformers' `LlavaOnevisionModel.pack_image_features`: bilinear, before the newlines.
    """
    grids = [unpadded_grid(spec, width, height) for height, width in image_sizes]
    kept = [shrunk_grid(spec, *grid) for grid in grids]
    if grids == kept:
        return features_ID
    per_tile = (spec.size // spec.patch_size) ** 2
    lengths = [per_tile + num_rows * (num_columns + 1) for num_rows, num_columns in grids]
    parts = zip(features_ID.split(lengths), grids, kept, strict=True)
    return torch.cat([part if grid == new else _shrunk(part, per_tile, grid, new) for part, grid, new in parts])


def _shrunk(features_ID: Tensor, per_tile: int, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    lines_RCD = features_ID[per_tile:].unflatten(0, (grid[0], grid[1] + 1))
    image_1DRC, newline_11D = lines_RCD[:, :-1].permute(2, 0, 1).unsqueeze(0), lines_RCD[:1, -1:]
    fewer_RCD = F.interpolate(image_1DRC, list(new), mode="bilinear")[0].permute(1, 2, 0)
    lines_RCD = torch.cat([fewer_RCD, newline_11D.expand(new[0], -1, -1)], dim=1)
    return torch.cat([features_ID[:per_tile], lines_RCD.flatten(0, 1)])


def real_tiles(
    spec: ImageSpec, pixel_values: Tensor, image_sizes: Tensor | None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pixels [T, C, S, S] and (height, width) of each image, from a transformers processor's output.

    AnyRes pads the tiles of N images to [N, most, C, S, S] and gives `image_sizes` [N, 2].
    """
    if image_sizes is None:
        return pixel_values, []
    sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
    tiles = [pixels[: _of_image(spec, *size)[1]] for pixels, size in zip(pixel_values, sizes, strict=True)]
    return torch.cat(tiles), sizes


@lru_cache(maxsize=4096)
def _of_image(spec: ImageSpec, height: int, width: int) -> tuple[Tensor, int]:
    """(the arrangement of one image alone, with -1 for the newline; its number of tiles)."""
    side = spec.size // spec.patch_size
    whole = torch.arange(side * side)
    if (height, width) == WHOLE:
        return torch.cat([whole, whole.new_full((1,), -1)]), 1
    canvas_height, canvas_width = canvas_size(spec, width, height)
    down, across = canvas_height // spec.size, canvas_width // spec.size
    tiles = side * side + torch.arange(down * across * side * side).view(down, across, side, side)
    grid = tiles.permute(0, 2, 1, 3).reshape(down * side, across * side)
    num_rows, num_columns = unpadded_grid(spec, width, height)
    top, left = (grid.shape[0] - num_rows) // 2, (grid.shape[1] - num_columns) // 2
    kept = grid[top : top + num_rows, left : left + num_columns]
    lines = torch.cat([kept, kept.new_full((num_rows, 1), -1)], dim=1)
    return torch.cat([whole, lines.flatten()]), 1 + down * across
