"""Heads side by side (Gloeckle et al. 2024, section 2): a transformer layer for each further token.

    states --+-- layer 1 -- norm 1 --> states for t+2
             +-- layer 2 -- norm 2 --> states for t+3

B rows, L positions, D the language model's width.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from models.mtp.base import MtpConfig
from models.mtp.heads import new_norm
from models.scratch_decoder import ScratchDecoderConfig, ScratchDecoderLayer


class ParallelFuture(MtpConfig):
    """Parallel heads for `num_tokens` future tokens; the next token needs none (Gloeckle et al. 2024)."""

    kind: Literal["parallel"] = "parallel"
    num_tokens: int = Field(default=4, ge=2, le=16)

    @property
    def num_drafts(self) -> int:
        """`num_tokens` - 1, since the next token needs no head."""
        return self.num_tokens - 1

    def build(self, layer: ScratchDecoderConfig) -> nn.Module:
        """See `MtpConfig.build`."""
        return ParallelHeads(self.num_drafts, layer)


class ParallelHeads(nn.Module):
    """A layer and a norm for each further token."""

    reads_next = False
    """Whether the next tokens' embeddings are used."""

    def __init__(self, num_drafts: int, layer: ScratchDecoderConfig) -> None:
        super().__init__()
        self.num_drafts = num_drafts
        self.layers = nn.ModuleList(ScratchDecoderLayer(layer, place) for place in range(num_drafts))
        self.norms = nn.ModuleList(new_norm(layer) for _ in range(num_drafts))

    def forward(self, states_BLD: Tensor, next_BLD: Tensor, **attention: Any) -> tuple[Tensor, ...]:
        """For each head the states [B, L, D] that go into the output head; `next_BLD` is not used."""
        del next_BLD
        return tuple(norm(layer(states_BLD, **attention)) for layer, norm in zip(self.layers, self.norms, strict=True))
