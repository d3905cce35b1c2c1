"""One module that gets the next token's embedding and predicts the token after it (DeepSeek-V3, section 2.2, depth 1).

    norm(states) | norm(embedding of t+1) -- linear -- layer -- norm --> states for t+2

B rows, L positions, D the language model's width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.mtp.base import MtpConfig
from models.mtp.heads import new_norm
from models.scratch_decoder import ScratchDecoderConfig, ScratchDecoderLayer
from models.shapes import LanguageShape, Linear


class SequentialFuture(MtpConfig):
    """One module that reads the next token and predicts the token after it (DeepSeek-V3)."""

    kind: Literal["sequential"] = "sequential"

    @property
    def num_drafts(self) -> int:
        """Always 1: the token after the next."""
        return 1

    def build(self, layer: ScratchDecoderConfig) -> nn.Module:
        """See `MtpConfig.build`."""
        return SequentialModule(layer)

    def shape(self, language: LanguageShape) -> LanguageShape:
        """A layer, and before it the matrix that joins the state and the next token."""
        shape = super().shape(language)
        return replace(shape, layer_linears=(Linear("join", 2 * shape.width, shape.width), *shape.layer_linears))


class SequentialModule(nn.Module):
    """A linear layer over state and next token's embedding, a decoder layer and a norm."""

    reads_next = True

    def __init__(self, layer: ScratchDecoderConfig) -> None:
        super().__init__()
        self.num_drafts = 1
        self.state_norm, self.token_norm = new_norm(layer), new_norm(layer)
        self.join = nn.Linear(2 * layer.hidden_size, layer.hidden_size, bias=False)
        self.layers = nn.ModuleList([ScratchDecoderLayer(layer, 0)])
        self.norm = new_norm(layer)

    def forward(self, states_BLD: Tensor, next_BLD: Tensor, **attention: Any) -> tuple[Tensor, ...]:
        """The states [B, L, D] that go into the output head; `next_BLD` are the next tokens' embeddings."""
        token_BLD = self.token_norm(next_BLD.to(states_BLD.dtype))
        joined_BLD = self.join(torch.cat([self.state_norm(states_BLD), token_BLD], dim=-1))
        return (self.norm(self.layers[0](joined_BLD, **attention)),)
