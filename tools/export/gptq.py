"""GPTQ: rounds a weight column by column, and lets the columns that are not rounded yet make up for the error.

    W, H = sum of x x^T over a layer's real inputs --> W' on the grid, of small |(W - W') x| rather than |W - W'|

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1, with the columns of the largest inputs first ("act
order") and each group's scale taken beforehand, so that groups stay where they are. The grid and its scales are
those of compressed-tensors. Legend: N outputs, K inputs, G groups of K, M positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DAMPING = 0.05
"""Added to H's diagonal, as a share of its mean. A golden set has fewer positions than a large layer has inputs, so
that H alone has no inverse; the usual 0.01 follows so few positions too closely."""

BLOCK = 128
"""Columns after which the error is spread over all later ones at once, in one product of matrices."""


class Hessian:
    """The sum of x x^T over a layer's inputs, in fp32 on the inputs' device."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_KK = torch.zeros(width, width, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs [..., K]."""
        x_MK = x.reshape(-1, x.shape[-1]).float()
        self.sum_KK.addmm_(x_MK.T, x_MK)

    def relative_error(self, weight_NK: Tensor, found_NK: Tensor) -> float:
        """|(W - W') x| / |W x| over the inputs that were added."""
        change_NK = weight_NK - found_NK
        moved = ((change_NK @ self.sum_KK) * change_NK).sum().clamp(min=0).sqrt()
        whole = ((weight_NK @ self.sum_KK) * weight_NK).sum().clamp(min=0).sqrt()
        return float(moved / whole.clamp(min=1e-30))


def group_scales(weight_NK: Tensor, args: Any) -> Tensor:
    """The scale of each group of inputs [N, G], by compressed-tensors' rule: the largest value is the grid's end."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups_NGS = weight_NK.unflatten(1, (-1, args.group_size))
    scales, _ = calculate_qparams(groups_NGS.amin(-1), groups_NGS.amax(-1), args)
    return scales


def gptq(weight_NK: Tensor, hessian: Hessian, scales_NG: Tensor, args: Any) -> Tensor:
    """The weight on the grid of `scales_NG`, in fp32.

    Args:
        args: compressed-tensors' QuantizationArgs: symmetric, in groups of inputs.
    """
    from compressed_tensors.quantization.utils import calculate_range

    low, high = (float(bound) for bound in calculate_range(args, weight_NK.device))
    scales_NK = scales_NG.float().repeat_interleave(args.group_size, dim=1)
    order_K = hessian.sum_KK.diagonal().argsort(descending=True)
    left_NK, scales_NK = weight_NK.float()[:, order_K].clone(), scales_NK[:, order_K]
    spread_KK = _inverse_factor(hessian.sum_KK[order_K][:, order_K])
    found_NK = torch.empty_like(left_NK)
    for start in range(0, left_NK.shape[1], BLOCK):
        stop = min(start + BLOCK, left_NK.shape[1])
        errors_NB = torch.empty_like(left_NK[:, start:stop])
        for column in range(start, stop):
            scale_N, value_N = scales_NK[:, column], left_NK[:, column]
            rounded_N = (value_N / scale_N).round().clamp(low, high) * scale_N
            error_N = (value_N - rounded_N) / spread_KK[column, column]
            left_NK[:, column:stop] -= error_N[:, None] * spread_KK[column, column:stop]
            found_NK[:, column], errors_NB[:, column - start] = rounded_N, error_N
        left_NK[:, stop:] -= errors_NB @ spread_KK[start:stop, stop:]
    return found_NK[:, order_K.argsort()]


def _inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped H's inverse: row k spreads column k's error over later columns."""
    damped_KK = hessian_KK.clone()
    diagonal = damped_KK.diagonal()
    diagonal += max(DAMPING * float(diagonal.mean()), 1e-12)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_KK)), upper=True)
