"""Attention with the terms that kernels leave out: a window, a soft cap on the scores, sinks.

    scores = cap * tanh(q k / cap)           (Gemma 2)
    weights = softmax([scores, sinks])       (gpt-oss: a learnt score a head, whose share goes nowhere)
    a query sees itself and the window - 1 positions before it

Operation for operation as transformers' own `eager_attention_forward` of those classes. B rows, H heads, L positions, d
a head's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NO_ARITHMETIC = frozenset(
    {
        "is_causal",
        "position_ids",
        "cache_position",
        "cache_params",
        "cache",
        "past_key_values",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "position_embeddings",
        "logits_to_keep",
        "num_items_in_batch",
    }
)
"""Arguments that transformers' layers pass on, and that change nothing here."""


@dataclass(frozen=True)
class Terms:
    """What a layer asks for in addition to causal attention."""

    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    """[H]"""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Terms:
        """Those among the arguments of a layer's call.

        Raises:
            ValueError: one that is not known here, or attention that is not causal.
        """
        known = {"sliding_window", "softcap", "s_aux"}
        unknown = [name for name, value in options.items() if name not in known | _NO_ARITHMETIC and value is not None]
        if unknown:
            raise ValueError(f"attention is called with {', '.join(unknown)}, which is not applied to packed samples")
        if options.get("is_causal") is False:
            raise ValueError("attention is not causal, and packed samples are")
        return cls(options.get("sliding_window"), options.get("softcap"), options.get("s_aux"))

    def within(self, length: int) -> Terms:
        """Those that matter to samples of at most `length` tokens."""
        window = self.window if self.window is not None and self.window < length else None
        return Terms(window, self.soft_cap, self.sinks)

    @property
    def is_plain(self) -> bool:
        """Whether attention is causal and nothing else, so that every kernel computes it."""
        return self.window is None and self.soft_cap is None and self.sinks is None


def attend_with(
    states: tuple[Tensor, Tensor, Tensor],
    terms: Terms,
    scale: float,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """q [B, H, L, d], k and v [B, H', L', d] -> [B, H, L, d].

    Args:
        mask: what may be seen, boolean or added to the scores; None: causal, the last query at the last key.
    """
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if terms.soft_cap is not None:
        scores = terms.soft_cap * torch.tanh(scores / terms.soft_cap)
    if mask is None:
        mask = _causal(scores.shape[-2], scores.shape[-1], terms.window, scores.device)
    mask = mask[..., : scores.shape[-1]]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = _softmax(scores, terms.sinks)
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights.to(value.dtype), value)


def _causal(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    queries = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    columns = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, columns], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
