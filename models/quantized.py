"""int8 layers of bitsandbytes that move with the model that they are in.

`Linear8bitLt` moves its scales in a `to` of its own. torch moves a whole model by each module's `_apply`, so the scales
stay where they were (bitsandbytes 0.50, nn/modules.py), and the first product fails or reads another device's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def follow_weights(model: nn.Module) -> None:
    """Move what the int8 layers of a model keep beside their weight to the weight's device."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            _follow_weight(module)


def _follow_weight(layer: Any) -> None:
    weight = layer.weight
    if weight.dtype != torch.int8:
        return  # not quantized yet: its own `to` does that
    for owner in (weight, layer.state):
        if owner.CB is not None:
            owner.CB = weight.data  # the same tensor, not a copy
        if owner.SCB is not None:
            owner.SCB = owner.SCB.to(weight.device)
