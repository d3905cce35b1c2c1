"""A projector whose features are gated: linear(x) * sigmoid(gate(x)). T tiles, P features, V and D widths."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from models.common.source import FindPart, read_part
from models.projectors.base import ProjectorConfig


class GatedProjector(ProjectorConfig):
    """`bias` is that of the gate, before training."""

    kind: Literal["gated"] = "gated"
    bias: float = 0.0

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`."""
        del find
        return Gated(vision_width, language_width, self.bias)


class Gated(nn.Module):
    """[T, P, V] -> [T, P, D]."""

    def __init__(self, vision_width: int, language_width: int, bias: float) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(vision_width, language_width), nn.Linear(vision_width, language_width)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, features_TPV: Tensor) -> Tensor:
        """Image tokens [T, P, D]."""
        projected: Tensor = self.linear(features_TPV) * self.gate(features_TPV).sigmoid()
        return projected
