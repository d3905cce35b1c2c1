"""Building blocks of projectors with attention: attention from one sequence to another, and learned queries.

B rows, L query positions, S source positions, W the queries' width, U the source's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_DEVIATION, ITS_WIDTH = 0.02, 768
"""BERT's, at BERT's width; at another width new weights are scaled so that outputs keep the same magnitude."""


class Attention(nn.Module):
    """Multi-head attention with biases, as BERT's."""

    def __init__(self, width: int, source_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=INITIAL_DEVIATION * (ITS_WIDTH / linear.in_features) ** 0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, asking_BLW: Tensor, source_BSU: Tensor, may_see_BLS: Tensor | None = None) -> Tensor:
        """The attention output [B, L, W]; `may_see_BLS` is true where a query may attend to a source position."""
        parts = (self.query(asking_BLW), self.key(source_BSU), self.value(source_BSU))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mask = may_see_BLS.unsqueeze(1) if may_see_BLS is not None else None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        given: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return given


class LearnedQueries(nn.Module):
    """Trained vectors [N, W]. A module, so that ZeRO-3 gathers them when it is called."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(INITIAL_DEVIATION * torch.randn(num, width))

    def forward(self, num_rows: int) -> Tensor:
        """The vectors for each row, [rows, N, W]."""
        return self.weight.unsqueeze(0).expand(num_rows, -1, -1)
