"""GPTQ against plain rounding: never worse where inputs are alike, and the same where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.export.gptq import Hessian, gptq, group_scales
from tools.export.packed import pack, scheme, unpack

SIZE = 32


def rounded(weight: Tensor, scales: Tensor) -> Tensor:
    scale = scales.repeat_interleave(SIZE, dim=1)
    return (weight / scale).round().clamp(-8, 7) * scale


def hessian_of(inputs: Tensor) -> Hessian:
    found = Hessian(inputs.shape[1], inputs.device)
    found.add(inputs)
    return found


def test_inputs_that_go_together_make_up_for_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 160, generator=generator)
    inputs = torch.randn(400, 40, generator=generator) @ torch.randn(40, 160, generator=generator)
    inputs += 0.3 * torch.randn(400, 160, generator=generator)
    hessian, args = hessian_of(inputs), scheme(4, SIZE).weights
    scales = group_scales(weight, args)
    found = gptq(weight, hessian, scales, args)
    plain = hessian.relative_error(weight, rounded(weight, scales))
    assert hessian.relative_error(weight, found) < 0.7 * plain
    change = (inputs @ (weight - found).T).norm() / (inputs @ weight.T).norm()
    assert hessian.relative_error(weight, found) == pytest.approx(float(change), rel=1e-3)


def test_inputs_that_tell_nothing_of_each_other_leave_plain_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    args = scheme(4, SIZE).weights
    scales = group_scales(weight, args)
    assert torch.equal(gptq(weight, hessian_of(torch.eye(64)), scales, args), rounded(weight, scales))


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (8, torch.float32), (4, torch.bfloat16)])
def test_the_grid_is_what_is_packed_and_read_again(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 64, generator=generator), torch.randn(9, 64, generator=generator)
    packing = scheme(bits, SIZE)
    scales = group_scales(weight, packing.weights).to(dtype)
    found = gptq(weight, hessian_of(inputs), scales, packing.weights)  # fewer positions than inputs
    parts = pack("a.weight", found, scales, packing)
    assert parts["a.weight_packed"].shape == (16, 64 * bits // 32)
    given = {"config_groups": {"group_0": packing.model_dump(mode="json")}}
    read = unpack({name.removeprefix("a."): value for name, value in parts.items()}, given)
    assert torch.equal(read, found.to(dtype))
    again = gptq(found, hessian_of(inputs), scales, packing.weights)
    assert torch.allclose(again, found, atol=1e-6), "what is on the grid stays"
