"""Perceiver resampler (Alayrac et al. 2022, Flamingo, section 3.1.1): learnt latents that read a tile's features.

    latents_IV --layers of: attend to (features, latents), feed forward--> norm --linear--> projected_TID

T tiles, P features a tile, V the encoder's width, I latents, D the language model's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import PerceiverProjector
from models.projectors.attention import Attention, Learnt


class Perceiver(nn.Module):
    """I tokens of every tile, however many features it has."""

    def __init__(self, config: PerceiverProjector, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.queries = Learnt(config.num_queries, vision_width)
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
