"""Pixel shuffle (InternVL, nanoVLM): each square of f x f neighbouring features becomes one token, then an MLP.

T tiles, P features a tile on a square grid of g x g, V the encoder's width, I = P / f² tokens, D the language model's
width.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from models.common.errors import InputError
from models.common.source import FindPart, read_part
from models.projectors.base import ProjectorConfig
from models.shapes import Linear, ProjectorShape


class PixelShuffleProjector(ProjectorConfig):
    """Squares of `factor` x `factor` neighbouring features become one token each, then an MLP (InternVL)."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: PositiveInt = 2

    def num_tokens(self, num_features: int) -> int:
        """One per square. Raises InputError where the features are not a grid of such squares."""
        side = math.isqrt(num_features)
        if side**2 != num_features or side % self.factor:
            raise InputError(
                f"model.projector.factor: {num_features} features are no grid of {self.factor} x {self.factor} squares;"
                " leave keep_cls out, or take another factor"
            )
        return num_features // self.factor**2

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`."""
        del find
        return PixelShuffle(self.factor, vision_width, language_width)

    def shape(
        self, vision_width: int, language_width: int, num_features: int, find: FindPart = read_part
    ) -> ProjectorShape:
        """The MLP's two matrices, once for each image token."""
        del num_features, find
        first = Linear("linear_1", self.factor**2 * vision_width, language_width)
        return ProjectorShape((first, Linear("linear_2", language_width, language_width)))


class PixelShuffle(nn.Module):
    """A quarter (f = 2) of the tokens, each four features wide before the MLP."""

    def __init__(self, factor: int, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.factor = factor
        merged = vision_width * factor**2
        self.norm = nn.LayerNorm(merged)
        self.linear_1 = nn.Linear(merged, language_width)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Projected features [T, I, D]."""
        merged = merge_squares(features_TPV, self.factor)
        projected: Tensor = self.linear_2(self.activation(self.linear_1(self.norm(merged))))
        return projected


def merge_squares(features_TPV: Tensor, factor: int) -> Tensor:
    """[T, P, V] -> [T, P / f², f² V]: neighbours concatenated row by row, tokens in the order of their squares."""
    num_tiles, num_features, width = features_TPV.shape
    side = math.isqrt(num_features)
    grid = features_TPV.view(num_tiles, side // factor, factor, side // factor, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(num_tiles, num_features // factor**2, factor**2 * width)
