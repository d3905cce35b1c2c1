"""Heads that predict further into the future than the next token, on top of any causal language model.

    parallel     states --+-- layer 1 -- norm 1 --> what predicts t+2      Gloeckle et al. 2024, section 2:
                          +-- layer 2 -- norm 2 --> what predicts t+3      a transformer layer for each token
    sequential   norm(states) | norm(embedding of t+1) -- linear -- layer -- norm --> what predicts t+2
                                                                           DeepSeek-V3, section 2.2, one module

All of them share the language model's own output head; the next token stays the language model's business. A layer has
no positions of its own: the states know theirs. B rows, L positions, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import register
from models.config import FutureConfig, ParallelFuture, SequentialFuture
from models.lean import LeanRMSNorm
from models.own_decoder import OwnDecoderConfig, OwnDecoderLayer, is_writer


class ParallelHeads(nn.Module):
    """A layer and a norm for each further token."""

    reads_next = False
    """Whether the next tokens' embeddings are looked at."""

    def __init__(self, config: ParallelFuture, shape: OwnDecoderConfig) -> None:
        super().__init__()
        self.num_drafts = config.num_tokens - 1
        self.layers = nn.ModuleList(OwnDecoderLayer(shape, place) for place in range(self.num_drafts))
        self.norms = nn.ModuleList(_norm(shape) for _ in range(self.num_drafts))

    def forward(self, states_BLD: Tensor, next_BLD: Tensor, **attention: Any) -> tuple[Tensor, ...]:
        """For each head the states [B, L, D] that the output head makes logits of; `next_BLD` is not looked at."""
        del next_BLD
        return tuple(norm(layer(states_BLD, **attention)) for layer, norm in zip(self.layers, self.norms, strict=True))


class SequentialModule(nn.Module):
    """One module that is told the next token and predicts the one behind it."""

    reads_next = True

    def __init__(self, config: SequentialFuture, shape: OwnDecoderConfig) -> None:
        del config
        super().__init__()
        self.num_drafts = 1
        self.state_norm, self.token_norm = _norm(shape), _norm(shape)
        self.join = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([OwnDecoderLayer(shape, 0)])
        self.norm = _norm(shape)

    def forward(self, states_BLD: Tensor, next_BLD: Tensor, **attention: Any) -> tuple[Tensor, ...]:
        """The states [B, L, D] that the output head makes logits of; `next_BLD` are the next tokens' embeddings."""
        token_BLD = self.token_norm(next_BLD.to(states_BLD.dtype))
        joined_BLD = self.join(torch.cat([self.state_norm(states_BLD), token_BLD], dim=-1))
        return (self.norm(self.layers[0](joined_BLD, **attention)),)


FUTURES: dict[str, Callable[[Any, OwnDecoderConfig], nn.Module]] = {
    "parallel": ParallelHeads,
    "sequential": SequentialModule,
}


def build_future(config: FutureConfig, language: Any) -> nn.Module:
    """The heads that `config` names for a language model's configuration, drawn from torch's global generator."""
    shape = OwnDecoderConfig(
        hidden_size=int(language.hidden_size),
        intermediate_size=int(language.intermediate_size),
        num_attention_heads=int(language.num_attention_heads),
        rms_norm_eps=float(language.rms_norm_eps),
    )
    shape._attn_implementation = register()
    heads = FUTURES[config.kind](config, shape)
    for module in heads.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.1 if is_writer(module) else 1.0))
    return heads


def _norm(shape: OwnDecoderConfig) -> LeanRMSNorm:
    return LeanRMSNorm(nn.Parameter(torch.ones(shape.hidden_size)), shape.rms_norm_eps)
