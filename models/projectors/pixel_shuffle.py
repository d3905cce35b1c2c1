"""Pixel shuffle (InternVL, nanoVLM): each square of f x f neighbouring features becomes one token, then an MLP.

T tiles, P features a tile on a square grid of g x g, V the encoder's width, I = P / f² tokens, D the language model's
width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from models.config import PixelShuffleProjector


class PixelShuffle(nn.Module):
    """A quarter (f = 2) of the tokens, each four features wide before the MLP."""

    def __init__(self, config: PixelShuffleProjector, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.factor = config.factor
        merged = vision_width * config.factor**2
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
    """[T, P, V] -> [T, P / f², f² V]: neighbours side by side, row by row, tokens in the order of their squares."""
    num_tiles, num_features, width = features_TPV.shape
    side = math.isqrt(num_features)
    grid = features_TPV.view(num_tiles, side // factor, factor, side // factor, factor, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(num_tiles, num_features // factor**2, factor**2 * width)
