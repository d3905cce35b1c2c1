"""Projectors that treat each feature by itself: one linear layer, or two.

T tiles, P image tokens a tile, V the encoder's width, D the language model's width.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.config import LinearProjector, MlpProjector


class Linear(nn.Module):
    """One linear layer, D x V and a bias: the 4.2M parameters between CLIP ViT-L/14 and Vicuna-7B."""

    def __init__(self, config: LinearProjector, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, language_width)
        if config.init_gain is not None:
            nn.init.xavier_normal_(self.linear.weight, gain=config.init_gain)
            nn.init.zeros_(self.linear.bias)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Projected features [T, P, D]."""
        projected: Tensor = self.linear(features_TPV)
        return projected


class Mlp(nn.Module):
    """Linear, GELU, Linear (LLaVA-1.5, `mlp2x_gelu`)."""

    def __init__(self, config: MlpProjector, vision_width: int, language_width: int) -> None:
        del config
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Projected features [T, P, D]."""
        projected: Tensor = self.linear_2(self.activation(self.linear_1(features_TPV)))
        return projected
