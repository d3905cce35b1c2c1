"""Two linear layers with GELU between them, from each feature to an image token (Liu et al. 2023, LLaVA-1.5).

T tiles, P features a tile and as many image tokens, V the encoder's width, D the language model's width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from models.common.source import FindPart, read_part
from models.projectors.base import ProjectorConfig
from models.projectors.weights import load_projector


class MlpProjector(ProjectorConfig):
    """Linear, GELU, Linear, as in LLaVA-1.5; the hidden width is the language model's.

    `weights`: a file to start from, LLaVA's mm_projector.bin or safetensors.
    """

    kind: Literal["mlp"] = "mlp"
    weights: str | None = None
    keeps_patches: ClassVar[bool] = True
    llava_activation: ClassVar[str | None] = "gelu"

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`."""
        del find
        return Mlp(vision_width, language_width)

    def load_pretrained(self, projector: nn.Module) -> None:
        """See `ProjectorConfig.load_pretrained`."""
        if self.weights is not None:
            load_projector(projector, self.weights, {"0": "linear_1", "2": "linear_2"})


class Mlp(nn.Module):
    """Linear, GELU, Linear (LLaVA-1.5, `mlp2x_gelu`), with the parameter names of transformers' Llava.

    Args:
        activation: by its name in transformers, for published models that have another one.
        bias: whether the layers have one.
    """

    def __init__(self, vision_width: int, language_width: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width, bias=bias)
        self.activation = nn.GELU() if activation == "gelu" else _activation(activation)
        self.linear_2 = nn.Linear(language_width, language_width, bias=bias)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Projected features [T, P, D]."""
        projected: Tensor = self.linear_2(self.activation(self.linear_1(features_TPV)))
        return projected


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    found: nn.Module = ACT2FN[name]
    return found
