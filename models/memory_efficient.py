"""The norm and the gated MLP of a Llama layer, with fewer bytes kept for the backward pass.

Their results are those of transformers' modules, operation for operation; they differ in what they keep in memory for
the backward pass. In units of one activation (tokens x width, in the model's dtype):

    RMSNorm    transformers keeps an fp32 copy of its input: 2 in bf16; here its input: 1
    MLP        transformers keeps gate, silu(gate) and up: 3 x 2.7 in Llama-7B; here gate and up: 2 x 2.7

so a frozen layer with full attention heads keeps 11.4 units instead of 16.1. Parameters keep their names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class MemoryEfficientRMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]. On CUDA this is torch's fused kernel, which rounds once, not twice."""
        if x.is_cuda and x.dtype == self.weight.dtype:
            with torch.autocast("cuda", enabled=False):
                return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        normed: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)
        return normed


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        to_x = to_weight = None
        if ctx.needs_input_grad[1]:
            leading = tuple(range(gradient.ndim - 1))
            to_weight = (gradient * normed.to(x.dtype)).sum(leading).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            to_normed = (gradient * weight).to(x.dtype).float()
            to_x = inverse * (to_normed - normed * (to_normed * normed).mean(-1, keepdim=True))
            to_x = to_x.to(x.dtype)
        return to_x, to_weight, None


class MemoryEfficientMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        projected: Tensor = self.down_proj(_GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))
        return projected


class _GatedSilu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


def use_memory_efficient_layers(layer: Any, activation: str) -> None:
    """Replace a transformers decoder layer's norms and MLP by the modules above, sharing the same parameters.

    `activation` is the layer's own, by its name in the configuration; the MLP stays as it is unless that is SiLU.
    """
    for parent, name in (
        (layer, "input_layernorm"),
        (layer, "post_attention_layernorm"),
        (layer.self_attn, "q_norm"),
        (layer.self_attn, "k_norm"),
    ):
        if hasattr(parent, name):
            norm = getattr(parent, name)
            setattr(parent, name, MemoryEfficientRMSNorm(norm.weight, norm.variance_epsilon))
    if activation in ("silu", "swish"):
        layer.mlp = MemoryEfficientMLP(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
