"""Perceiver resampler (Alayrac et al. 2022, Flamingo, section 3.1.1): learned latents that attend to a tile's features.

    latents_IV --layers of: attend to (features, latents), feed forward--> norm --linear--> projected_TID

T tiles, P features a tile, V the encoder's width, I latents, D the language model's width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from models.common.source import FindPart, read_part
from models.projectors.attention import Attention, LearnedQueries
from models.projectors.base import ProjectorConfig
from models.shapes import Linear, ProjectorShape, attention_linears


class PerceiverProjector(ProjectorConfig):
    """Flamingo's resampler: `num_queries` latents that attend to the features in `num_layers` layers."""

    kind: Literal["perceiver"] = "perceiver"
    num_queries: PositiveInt = 64
    num_layers: PositiveInt = 6
    num_heads: PositiveInt = 8

    def num_tokens(self, num_features: int) -> int:
        """`num_queries`, whatever the number of features."""
        del num_features
        return self.num_queries

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`."""
        del find
        return Perceiver(self, vision_width, language_width)

    def shape(
        self, vision_width: int, language_width: int, num_features: int, find: FindPart = read_part
    ) -> ProjectorShape:
        """Keys and values of the features and of the latents themselves; the rest of a layer at the latents alone."""
        del find
        layer = (
            *attention_linears(vision_width, vision_width, 1 + num_features / self.num_queries),
            Linear("up", vision_width, 4 * vision_width),
            Linear("down", 4 * vision_width, vision_width),
        )
        return ProjectorShape((*layer * self.num_layers, Linear("output", vision_width, language_width)))


class Perceiver(nn.Module):
    """Maps a tile with any number of features to I tokens."""

    def __init__(self, config: PerceiverProjector, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.queries = LearnedQueries(config.num_queries, vision_width)
        self.layers = nn.ModuleList(Layer(vision_width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(vision_width)
        self.output = nn.Linear(vision_width, language_width)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Projected features [T, I, D]."""
        latents_TIV = self.queries(len(features_TPV))
        for layer in self.layers:
            latents_TIV = layer(latents_TIV, features_TPV)
        projected: Tensor = self.output(self.norm(latents_TIV))
        return projected


class Layer(nn.Module):
    """Pre-norm attention over features and latents together, then a feed-forward of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.latent_norm, self.feature_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, width, num_heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, latents_TIV: Tensor, features_TPV: Tensor) -> Tensor:
        """The latents after this layer, [T, I, V]."""
        normed_TIV = self.latent_norm(latents_TIV)
        source = torch.cat([self.feature_norm(features_TPV), normed_TIV], dim=1)
        latents_TIV = latents_TIV + self.attention(normed_TIV, source)
        after: Tensor = latents_TIV + self.feed_forward(latents_TIV)
        return after
