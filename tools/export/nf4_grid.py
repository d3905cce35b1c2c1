"""bitsandbytes' NF4 as a grid that GPTQ rounds to, and the tensors of a weight that lies on it.

    weight --bitsandbytes--> a scale for 64 inputs each (itself stored in 8 bits) --GPTQ--> codes of 4 bits beside it

The files are those of plain NF4, so every program that opens those opens these.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tools.export.bitsandbytes import quantized_parameter

GROUP_SIZE = 64
"""Inputs that share a scale: bitsandbytes' default. `models.languages.nf4` leaves layers without a multiple whole."""


class Nf4Grid:
    """16 values, unevenly spread between -1 and 1, times the scale of a group: see `tools.export.gptq.Grid`.

    Args:
        dtype: of the weights that would be quantized without calibration; their scales are taken.
    """

    group_size = GROUP_SIZE

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    @cached_property
    def _values(self) -> Tensor:
        """The 16 values in rising order, the place of each being its code."""
        from bitsandbytes.functional import get_4bit_type

        values: Tensor = get_4bit_type("nf4", device=self._device)
        return values

    @cached_property
    def _bounds(self) -> Tensor:
        return (self._values[1:] + self._values[:-1]) / 2

    def scales(self, weight_NK: Tensor) -> Tensor:
        """The scales that bitsandbytes gives the weight, read as it reads them."""
        return _stored_scales(self._plain(weight_NK).quant_state).view(len(weight_NK), -1)

    def rounded(self, value_N: Tensor, scale_N: Tensor) -> Tensor:
        """See `Grid`."""
        return self._values[self._codes(value_N, scale_N)] * scale_N

    def packed(self, name: str, weight_NK: Tensor, found_NK: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that replace the weight `name` in a bundle's files, for `found_NK` on the grid of its scales."""
        plain = self._plain(weight_NK)
        scales_NK = _stored_scales(plain.quant_state).view(len(weight_NK), -1).repeat_interleave(GROUP_SIZE, dim=1)
        codes = self._codes(found_NK, scales_NK).flatten().to(torch.uint8)
        yield name, (codes[0::2] << 4 | codes[1::2]).view(plain.data.shape)
        for key, stat in plain.quant_state.as_dict(packed=True).items():
            yield f"{name}.{key}", stat

    def _plain(self, weight_NK: Tensor) -> Any:
        return quantized_parameter(weight_NK.to(self._dtype), "nf4", self._device)

    def _codes(self, value: Tensor, scale: Tensor) -> Tensor:
        """The code of the nearest value; a group of zeros has none that matters."""
        return torch.bucketize(value / scale.clamp(min=torch.finfo(torch.float32).tiny), self._bounds)


def _stored_scales(state: Any) -> Tensor:
    """A 4-bit weight's scales in fp32, read out of the 8 bits that they are stored in."""
    from bitsandbytes.functional import dequantize_blockwise

    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()
