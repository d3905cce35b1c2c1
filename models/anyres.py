"""AnyRes in the model: which feature of which tile stands where among a picture's image tokens (LLaVA-NeXT).

    tile 0, the whole picture           its P features as they come
    tiles 1 … a*b, parts of the canvas  put together again to rows of patches, the padding around the picture cut off,
                                        and behind each row the newline, a vector that is learnt with the projector

Equals transformers' `LlavaNextModel.pack_image_features`; LLaVA calls it `spatial_unpad`. Canvas and unpadded grid are
those of `models.spec`, which counts the tokens. P features a tile, D the language model's width, F features of all
tiles, I image tokens of all pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from models.spec import AnyResImage, ImageFit, ImageSpec, canvas_size, unpadded_grid


class NewLine(nn.Module):
    """The vector [D] behind each row of patches: `image_newline` of LLaVA-NeXT, with its first values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, features_FD: Tensor) -> Tensor:
        """The features with the newline behind them, [F + 1, D]."""
        return torch.cat([features_FD, self.weight.to(features_FD.dtype).unsqueeze(0)])


def with_newline(projector: nn.Module, fit: ImageFit, language_width: int) -> nn.Module:
    """The projector; under AnyRes with a newline of its own, which learns, is saved and is merged as part of it."""
    if isinstance(fit, AnyResImage):
        projector.newline = NewLine(language_width)
    return projector


def arrangement(spec: ImageSpec, picture_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Where each image token's feature stands, int64 [I]: among the F features of all tiles, or F for the newline.

    `picture_sizes` are (height, width) of the pictures before they were fitted, in their order.
    """
    parts = [_of_picture(spec, height, width) for height, width in picture_sizes]
    per_tile = (spec.size // spec.patch_size) ** 2
    num_features = per_tile * sum(num_tiles for _, num_tiles in parts)
    start, places = 0, []
    for local_I, num_tiles in parts:
        places.append(torch.where(local_I < 0, num_features, local_I + start))
        start += per_tile * num_tiles
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)


def real_tiles(
    spec: ImageSpec, pixel_values: Tensor, image_sizes: Tensor | None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pixels [T, C, S, S] and (height, width) of each picture, from what a processor of transformers gives.

    AnyRes pads the tiles of N pictures to [N, most, C, S, S] and gives `image_sizes` [N, 2].
    """
    if image_sizes is None:
        return pixel_values, []
    sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
    tiles = [pixels[: _of_picture(spec, *size)[1]] for pixels, size in zip(pixel_values, sizes, strict=True)]
    return torch.cat(tiles), sizes


@lru_cache(maxsize=4096)
def _of_picture(spec: ImageSpec, height: int, width: int) -> tuple[Tensor, int]:
    """(the arrangement of one picture alone, with -1 for the newline; its number of tiles)."""
    canvas_height, canvas_width = canvas_size(spec, width, height)
    side = spec.size // spec.patch_size
    down, across = canvas_height // spec.size, canvas_width // spec.size
    whole = torch.arange(side * side)
    tiles = side * side + torch.arange(down * across * side * side).view(down, across, side, side)
    grid = tiles.permute(0, 2, 1, 3).reshape(down * side, across * side)
    num_rows, num_columns = unpadded_grid(spec, width, height)
    top, left = (grid.shape[0] - num_rows) // 2, (grid.shape[1] - num_columns) // 2
    kept = grid[top : top + num_rows, left : left + num_columns]
    lines = torch.cat([kept, kept.new_full((num_rows, 1), -1)], dim=1)
    return torch.cat([whole, lines.flatten()]), 1 + down * across
