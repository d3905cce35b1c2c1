"""The projector of Qwen-VL: blocks of patches become image tokens, for the embedding and the decoder's first layers.

P patches, I image tokens, V the tower's width, D the language model's width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NativeMerger(nn.Module):
    """The mergers of a tower, which are transformers' own, under their own names."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.merger = tower.merger
        if hasattr(tower, "deepstack_merger_list"):
            self.deepstack_merger_list = tower.deepstack_merger_list

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Features [P, V] of the last block, and of each level -> image tokens [I, D], and of each level [I, D]."""
        last_PV, *levels = features
        deep = getattr(self, "deepstack_merger_list", ())
        return self.merger(last_PV), *(merge(level_PV) for merge, level_PV in zip(deep, levels, strict=True))
