"""Causal attention inside each of several samples that lie one after another, without padding and without a mask.

    q, k, v [N tokens of G samples] --the fastest of--> flash-attn's kernel  (CUDA, bf16 or fp16, where installed)
                                                        torch's own kernel   (CUDA, bf16 or fp16)
                                                        one call a sample    (everywhere)

One function is registered with transformers, so that its decoder layers call it as they are. Where it is given no
`Segments` (generation with a cache, a bundle's own forward) it is transformers' own SDPA with its masks.

Where samples begin, and how long the longest is, is counted once a batch on the host. Owns kernels and their choice,
not the layers (`decoder`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "sightline_packed"
"""What the attention function is called in a transformers configuration."""

_LONGEST_STEP = 256

Kernel = Callable[[Tensor, Tensor, Tensor, "Segments", float], Tensor]
"""(q [N, H, d], k and v [N, H', d], segments, scale) -> [N, H, d]."""


@dataclass(frozen=True)
class Segments:
    """Where the samples of a batch lie among its N tokens."""

    starts_G1: Tensor
    """int32, where each sample begins, and N; on the device."""
    lengths: tuple[int, ...]
    longest: int
    """At least the longest sample's length; a multiple of 256, so that a compiled layer meets few different values."""
    kernel: Kernel | None
    """The kernel that takes all samples at once; None: one call a sample."""

    @classmethod
    def of(cls, starts_G1: Tensor, lengths: Sequence[int]) -> Segments:
        """The segments of a batch whose tokens are on the device of `starts_G1`."""
        longest = -(-max(lengths) // _LONGEST_STEP) * _LONGEST_STEP
        return cls(starts_G1, tuple(lengths), longest, cuda_kernel() if starts_G1.is_cuda else None)


def register() -> str:
    """Make the attention function known to transformers, under the name that is returned."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a transformers layer calls: q [B, H, L, d], k and v [B, H', L', d] -> [B, L, H, d].

    With `segments`, B is 1 and L the tokens of all samples. Raises ValueError for a sliding window shorter than a
    sample, which no kernel here applies.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    window = options.get("sliding_window")
    if window is not None and window < max(segments.lengths):
        raise ValueError(f"a sample of {max(segments.lengths)} tokens, but attention sees {window}; shorten max_length")
    query, key, value = (_lower(states) for states in (query, key, value))
    if segments.kernel is None or dropout > 0.0 or query.dtype == torch.float32:
        return _one_by_one((query, key, value), segments.lengths, scaling, dropout), None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return segments.kernel(q, k, v, segments, scaling).unsqueeze(0), None


def _lower(states: Tensor) -> Tensor:
    """To autocast's dtype, as it does itself for torch's own attention but not for other kernels."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


@torch.compiler.disable
def _one_by_one(states: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int], scale: float, dropout: float) -> Tensor:
    """One call of torch's attention a sample. Not compiled: it would be anew for every batch's lengths."""
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(*(state.split(list(lengths), dim=2) for state in states), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


@lru_cache(maxsize=1)
def cuda_kernel() -> Kernel | None:
    """The kernel for CUDA: flash-attn's where it is installed, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return _torch_kernel()

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        starts, longest = segments.starts_G1, segments.longest
        return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True)

    return kernel


def _torch_kernel() -> Kernel | None:
    """`torch.nn.attention.varlen`. Causal is `is_causal` in torch 2.10, a window since; few key heads came later."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    takes_few_heads = "enable_gqa" in known
    takes_scale = "scale" in known

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        starts, longest = segments.starts_G1, segments.longest
        options = dict(causal)
        if takes_scale:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
        if q.shape[1] != k.shape[1]:
            if takes_few_heads:
                options["enable_gqa"] = True
            else:
                k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        attended: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
        return attended

    return kernel
