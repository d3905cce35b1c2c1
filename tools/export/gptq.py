"""GPTQ: rounds a weight column by column, and lets the columns that are not rounded yet make up for the error.

    W, H = sum of x x^T over a layer's real inputs --> W' on the grid, of small |(W - W') x| rather than |W - W'|

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1, with the columns of the largest inputs first ("act
order") and each group's scale taken beforehand, so that groups stay where they are. The grid and its scales are
those of compressed-tensors (`IntegerGrid`) or of bitsandbytes (`tools.export.nf4_grid`). Legend: N outputs, K inputs, G
groups of K, M positions.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

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


class Grid(Protocol):
    """The values that a quantized weight may have: a scale for each group of inputs, and what rounds to multiples."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        ...

    def scales(self, weight_NK: Tensor) -> Tensor:
        """The scale of each group of inputs [N, G], as it will be stored."""
        ...

    def rounded(self, value_N: Tensor, scale_N: Tensor) -> Tensor:
        """The nearest values on the grid of these scales."""
        ...


class IntegerGrid:
    """compressed-tensors' symmetric integers, in groups of inputs.

    Args:
        args: compressed-tensors' QuantizationArgs.
        dtype: of the stored scales.
    """

    def __init__(self, args: Any, dtype: torch.dtype) -> None:
        self._args, self._dtype = args, dtype

    @property
    def group_size(self) -> int:
        """See `Grid`."""
        return int(self._args.group_size)

    @cached_property
    def _range(self) -> tuple[float, float]:
        from compressed_tensors.quantization.utils import calculate_range

        low, high = calculate_range(self._args, torch.device("cpu"))
        return float(low), float(high)

    def scales(self, weight_NK: Tensor) -> Tensor:
        """By compressed-tensors' rule: the largest value is the grid's end."""
        from compressed_tensors.quantization.utils import calculate_qparams

        groups_NGS = weight_NK.unflatten(1, (-1, self.group_size))
        scales, _ = calculate_qparams(groups_NGS.amin(-1), groups_NGS.amax(-1), self._args)
        return scales.to(self._dtype)

    def rounded(self, value_N: Tensor, scale_N: Tensor) -> Tensor:
        """See `Grid`."""
        return (value_N / scale_N).round().clamp(*self._range) * scale_N


def gptq(weight_NK: Tensor, hessian: Hessian, scales_NG: Tensor, grid: Grid) -> Tensor:
    """The weight on the grid of `scales_NG`, in fp32."""
    scales_NK = scales_NG.float().repeat_interleave(grid.group_size, dim=1)
    order_K = hessian.sum_KK.diagonal().argsort(descending=True)
    left_NK, scales_NK = weight_NK.float()[:, order_K].clone(), scales_NK[:, order_K]
    spread_KK = _inverse_factor(hessian.sum_KK[order_K][:, order_K])
    found_NK = torch.empty_like(left_NK)
    for start in range(0, left_NK.shape[1], BLOCK):
        stop = min(start + BLOCK, left_NK.shape[1])
        errors_NB = torch.empty_like(left_NK[:, start:stop])
        for column in range(start, stop):
            scale_N, value_N = scales_NK[:, column], left_NK[:, column]
            rounded_N = grid.rounded(value_N, scale_N)
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
