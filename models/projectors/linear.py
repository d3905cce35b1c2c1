"""One linear layer from each feature to an image token, as in the first LLaVA.

T tiles, P features a tile and as many image tokens, V the encoder's width, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.common.source import FindPart, read_part
from models.projectors.base import ProjectorConfig
from models.projectors.weights import load_projector


class LinearProjector(ProjectorConfig):
    """One linear layer. `init_gain`: Xavier normal weights with that gain instead of PyTorch's default.

    `weights`: a file to start from, LLaVA's mm_projector.bin or safetensors.
    """

    kind: Literal["linear"] = "linear"
    weights: str | None = None
    init_gain: Annotated[float, Field(gt=0, le=1000)] | None = None
    keeps_patches: ClassVar[bool] = True
    llava_activation: ClassVar[str | None] = "linear"

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`."""
        del find
        return LinearLayer(vision_width, language_width, self.init_gain)

    def load_pretrained(self, projector: nn.Module) -> None:
        """See `ProjectorConfig.load_pretrained`."""
        if self.weights is not None:
            load_projector(projector, self.weights, {"": "linear"})

    def export_tensors(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Llava's two layers: ours, and the identity matrix, with no activation between them.

        Exact in any precision, since each output of the second is one product by 1 and sums of 0.
        """
        width = weights["linear.weight"].shape[0]
        yield "linear_1.weight", weights["linear.weight"]
        yield "linear_1.bias", weights["linear.bias"]
        yield "linear_2.weight", torch.eye(width)
        yield "linear_2.bias", torch.zeros(width)


class LinearLayer(nn.Module):
    """D x V and a bias: the 4.2M parameters between CLIP ViT-L/14 and Vicuna-7B."""

    def __init__(self, vision_width: int, language_width: int, init_gain: float | None) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, language_width)
        if init_gain is not None:
            nn.init.xavier_normal_(self.linear.weight, gain=init_gain)
            nn.init.zeros_(self.linear.bias)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Projected features [T, P, D]."""
        projected: Tensor = self.linear(features_TPV)
        return projected


def gelu_pair(weight_DV: Tensor, bias_D: Tensor) -> dict[str, Tensor] | None:
    """The linear layer as Llava's two with GELU between them, for programs that know no other activation.

    gelu(x) - gelu(-x) = x for each x, whether GELU is by erf or by tanh: the first layer's rows are I, -I and zeros,
    the second layer's columns W, -W and zeros. Both have D hidden values, so 2 V <= D is needed; None where it is not.
    """
    language_width, vision_width = weight_DV.shape
    if 2 * vision_width > language_width:
        return None
    first_DV = torch.zeros_like(weight_DV)
    first_DV[:vision_width].fill_diagonal_(1)
    first_DV[vision_width : 2 * vision_width].fill_diagonal_(-1)
    second_DD = weight_DV.new_zeros(language_width, language_width)
    second_DD[:, : 2 * vision_width] = torch.cat([weight_DV, -weight_DV], dim=1)
    return {
        "linear_1.weight": first_DV,
        "linear_1.bias": torch.zeros_like(bias_D),
        "linear_2.weight": second_DD,
        "linear_2.bias": bias_D.clone(),
    }
