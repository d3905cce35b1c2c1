"""Attention on a CPU is computed in fp32, whatever precision the stage has; fp32 stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Segments, attend

LENGTHS = (5, 3)


def attended(dtype: torch.dtype, *, autocast: bool = False) -> tuple[Tensor, ...]:
    """The result and the three gradients, for the same numbers (which bf16 holds) in `dtype`."""
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 8, 16).bfloat16().to(dtype).requires_grad_() for heads in (4, 2, 2)]
    segments = Segments.of(torch.tensor([0, 5, 8], dtype=torch.int32), LENGTHS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, _ = attend(nn.Identity(), *states, None, scaling=0.25, segments=segments)
    weight = torch.randn(1, 8, 4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    return out, *torch.autograd.grad((out * weight).sum(), states)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_fp32_rounded_once(autocast: bool) -> None:
    """torch's own bf16 kernel rounds probabilities and sums too."""
    narrow, wide = attended(torch.bfloat16, autocast=autocast), attended(torch.float32)
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other.bfloat16())


def test_fp32_is_torch_s_own_call_bit_for_bit() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 8, 16).bfloat16().float() for heads in (4, 2, 2))
    expected = [
        F.scaled_dot_product_attention(*each, is_causal=True, scale=0.25, enable_gqa=True)
        for each in zip(*(states.split(LENGTHS, dim=2) for states in (q, k, v)), strict=True)
    ]
    assert torch.equal(attended(torch.float32)[0].detach(), torch.cat(expected, dim=2).transpose(1, 2))
