"""Causal attention inside each of several samples that are packed one after another, without padding or mask.

    q, k, v [N tokens of G samples] --the fastest of--> flash-attn's kernel  (sm80 and newer, 16 bit, where installed)
                                                        torch's own kernel   (sm80 and newer, 16 bit)
                                                        one call a sample    (everywhere; on a CPU in fp32)

One function is registered with transformers, so that its unmodified decoder layers call it. Without
`Segments` (generation with a cache, a bundle's own forward) it is transformers' SDPA with its masks.

Sample starts and the longest length are computed once per batch, on the host. Owns kernels and their choice,
not the layers (`decoder`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention_terms import Terms, attend_with

NAME = "sightline_packed"
"""What the attention function is called in a transformers configuration."""

ONE_BY_ONE = "one call a sample"
"""The name of what runs everywhere."""

WIDENED_DEVICES = {"cpu"}
"""Kinds of devices on which attention in half precision is computed in fp32 (`_one_by_one` says why)."""

FLASH_CAPABILITY = (8, 0)
"""Compute capability from which the packed kernels run."""

_LONGEST_STEP = 256

_UNCOMPILED: dict[str, Callable[..., Tensor]] = {}
"""What `keep_uncompiled` has put here is called in place of the function that torch.compile would follow into."""

Kernel = Callable[[Tensor, Tensor, Tensor, "Segments", float], Tensor]
"""(q [N, H, d], k and v [N, H', d], segments, scale) -> [N, H, d]."""


@dataclass(frozen=True)
class Segments:
    """The boundaries of a batch's samples in its N tokens."""

    starts_G1: Tensor
    """int32, where each sample begins, and N; on the device."""
    lengths: tuple[int, ...]
    longest: int
    """At least the longest sample's length; a multiple of 256, so that a compiled layer sees few different values."""
    kernel: Kernel | None
    """The kernel that takes all samples at once; None: one call per sample."""
    is_causal: bool = True
    """Whether a position sees those before it alone; of an image all see all."""

    @classmethod
    def of(cls, starts_G1: Tensor, lengths: Sequence[int], *, is_causal: bool = True) -> Segments:
        """The segments of a batch whose tokens are on the device of `starts_G1`."""
        longest = -(-max(lengths) // _LONGEST_STEP) * _LONGEST_STEP
        _, kernel = choose_kernel(starts_G1.device, is_causal=is_causal)
        return cls(starts_G1, tuple(lengths), longest, kernel, is_causal)


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
    """The function that a transformers layer calls: q [B, H, L, d], k and v [B, H', L', d] -> [B, L, H, d].

    With `segments`, B is 1 and L the tokens of all samples. Windows, soft caps and sinks are applied, sample by sample
    (`models.attention_terms`). Raises ValueError for arguments that are not known here, and where samples are packed
    and a layer does not hand on where they begin.
    """
    if segments is None:
        options |= {"dropout": dropout, "scaling": scaling}
        return _without_segments(module, (query, key, value), attention_mask, options), None
    if _PACKED.is_running:  # no counting in compiled layers, which would be compiled again at each call
        _PACKED.num_calls += 1
    terms = Terms.of(options)
    if terms.window is not None:  # the lengths are looked at only here: compiled layers would be bound to them
        terms = terms.within(max(segments.lengths))
    query, key, value = (_lower(states) for states in (query, key, value))
    if not terms.is_plain or segments.kernel is None or dropout > 0.0 or query.dtype == torch.float32:
        one_by_one = _UNCOMPILED.get(ONE_BY_ONE, _one_by_one)
        return one_by_one((query, key, value), segments, scaling, dropout, terms), None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return segments.kernel(q, k, v, segments, scaling).unsqueeze(0), None


def _without_segments(
    module: nn.Module, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """What transformers' SDPA gives, or with a soft cap or sinks, which that leaves out, what its eager code does."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _PACKED.check()
    terms = Terms(options.get("sliding_window"), options.get("softcap"), options.get("s_aux"))
    if terms.soft_cap is None and terms.sinks is None:
        return sdpa_attention_forward(module, *states, mask, **options)[0]
    scale, dropout = options["scaling"], options["dropout"]
    return attend_with(states, terms, scale, mask=mask, dropout=dropout).transpose(1, 2).contiguous()


class _PackedForward:
    """Whether a decoder's own forward runs over packed samples, and how often attention knew where they begin."""

    def __init__(self) -> None:
        self.is_running, self.num_calls = False, 0

    def check(self) -> None:
        if self.is_running:
            raise ValueError("a layer does not hand on where packed samples begin, so they would see each other")


_PACKED = _PackedForward()


@contextmanager
def packed_forward() -> Iterator[_PackedForward]:
    """In this context attention without `segments` is an error; yields the count of the calls with them."""
    before = _PACKED.is_running, _PACKED.num_calls
    _PACKED.is_running, _PACKED.num_calls = True, 0
    try:
        yield _PACKED
    finally:
        _PACKED.is_running, _PACKED.num_calls = before


def _lower(states: Tensor) -> Tensor:
    """Cast to autocast's dtype. Autocast does this for torch's attention but not for other kernels."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _one_by_one(
    states: tuple[Tensor, Tensor, Tensor], segments: Segments, scale: float, dropout: float, terms: Terms
) -> Tensor:
    """One call of torch's attention per sample. Not compiled: every batch's lengths would cause a recompilation.

    On a CPU it is computed in fp32 whatever the dtype: the backward of torch 2.13's flash attention for the CPU takes 2
    to 6 times as long in bf16 (8 samples of 76 tokens, 9 heads over 3: 76 ms against 13 ms; one of 1,000: 221 ms
    against 97 ms), and the forward gains nothing.
    """
    device, dtype = states[0].device.type, states[0].dtype
    is_widened = device in WIDENED_DEVICES and dtype != torch.float32
    if is_widened:
        states = (states[0].float(), states[1].float(), states[2].float())
    # Autocast would cast back what this widens; what it would cast at all, `_lower` has cast.
    with torch.autocast(device, enabled=False):
        parts = [
            _of_sample((q, k, v), scale, dropout, terms.within(q.shape[2]), is_causal=segments.is_causal)
            for q, k, v in zip(*(state.split(list(segments.lengths), dim=2) for state in states), strict=True)
        ]
    attended = torch.cat(parts, dim=2).transpose(1, 2)
    return attended.to(dtype) if is_widened else attended


def _of_sample(
    states: tuple[Tensor, Tensor, Tensor], scale: float, dropout: float, terms: Terms, *, is_causal: bool
) -> Tensor:
    query, key, value = states
    if not terms.is_plain:
        return attend_with(states, terms, scale, dropout=dropout)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def keep_uncompiled() -> None:
    """Have torch.compile leave `_one_by_one` as it is. Call it before layers are compiled.

    Not a decorator: `torch.compiler.disable` imports torch's compiler, 1 to 2 CPU seconds for every process that
    imports this module, and few compile.
    """
    _UNCOMPILED.setdefault(ONE_BY_ONE, torch.compiler.disable(_one_by_one))


def choose_kernel(device: torch.device, *, is_causal: bool = True) -> tuple[str, Kernel | None]:
    """The kernel for a device, with its name; None for one call per sample, which every device can do.

    Both packed kernels are FlashAttention-2's, which needs compute capability 8.0 (sm80).
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return ONE_BY_ONE, None
    return _flash_kernel(is_causal)


@lru_cache(maxsize=2)
def _flash_kernel(is_causal: bool) -> tuple[str, Kernel | None]:
    """flash-attn's where it is installed, else torch's own.

    Their backwards add in whatever order threads come, unless torch is to be deterministic; torch's own one looks.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        torchs = _torch_kernel(is_causal)
        return ("torch's varlen_attn", torchs) if torchs is not None else (ONE_BY_ONE, None)

    def kernel(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        starts, longest = segments.starts_G1, segments.longest
        return flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return "flash-attn", kernel


def _torch_kernel(is_causal: bool = True) -> Kernel | None:
    """`torch.nn.attention.varlen`. torch 2.10 has `is_causal`, later versions a window and grouped key heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": is_causal}
    if "window_size" in known:
        causal = {"window_size": (-1, 0 if is_causal else -1)}
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
