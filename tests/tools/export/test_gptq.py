"""GPTQ against plain rounding: never worse where inputs are alike, and the same where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.export.bitsandbytes import packed
from tools.export.gptq import Hessian, IntegerGrid, gptq
from tools.export.nf4_grid import GROUP_SIZE, Nf4Grid
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
    hessian, grid = hessian_of(inputs), IntegerGrid(scheme(4, SIZE).weights, torch.float32)
    scales = grid.scales(weight)
    found = gptq(weight, hessian, scales, grid)
    plain = hessian.relative_error(weight, rounded(weight, scales))
    assert hessian.relative_error(weight, found) < 0.7 * plain
    change = (inputs @ (weight - found).T).norm() / (inputs @ weight.T).norm()
    assert hessian.relative_error(weight, found) == pytest.approx(float(change), rel=1e-3)


def test_inputs_that_tell_nothing_of_each_other_leave_plain_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    grid = IntegerGrid(scheme(4, SIZE).weights, torch.float32)
    scales = grid.scales(weight)
    assert torch.equal(gptq(weight, hessian_of(torch.eye(64)), scales, grid), rounded(weight, scales))


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (8, torch.float32), (4, torch.bfloat16)])
def test_the_grid_is_what_is_packed_and_read_again(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 64, generator=generator), torch.randn(9, 64, generator=generator)
    packing = scheme(bits, SIZE)
    grid = IntegerGrid(packing.weights, dtype)
    scales = grid.scales(weight)
    found = gptq(weight, hessian_of(inputs), scales, grid)  # fewer positions than inputs
    parts = pack("a.weight", found, scales, packing)
    assert parts["a.weight_packed"].shape == (16, 64 * bits // 32)
    given = {"config_groups": {"group_0": packing.model_dump(mode="json")}}
    read = unpack({name.removeprefix("a."): value for name, value in parts.items()}, given)
    assert torch.equal(read, found.to(dtype))
    again = gptq(found, hessian_of(inputs), scales, grid)
    assert torch.allclose(again, found, atol=1e-6), "what is on the grid stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_s_grid_is_what_bitsandbytes_reads(dtype: torch.dtype) -> None:
    """Plain rounding gives the very bytes that bitsandbytes writes; GPTQ's weight is read as it was found."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 2 * GROUP_SIZE, generator=generator).to(dtype).float()
    weight[3, :GROUP_SIZE] = 0  # a group without a scale
    inputs = torch.randn(400, 40, generator=generator) @ torch.randn(40, 2 * GROUP_SIZE, generator=generator)
    grid, hessian = Nf4Grid(dtype, torch.device("cpu")), hessian_of(inputs)
    scales = grid.scales(weight)
    alone = gptq(weight, hessian_of(torch.eye(2 * GROUP_SIZE)), scales, grid)
    plain = dict(packed("a.weight", weight.to(dtype), "nf4", torch.device("cpu")))
    written = dict(grid.packed("a.weight", weight, alone))
    assert plain.keys() == written.keys()
    assert all(torch.equal(plain[name], written[name]) for name in plain if name != "a.weight")
    nibbles = [torch.stack([each["a.weight"] >> 4, each["a.weight"] & 15]) for each in (plain, written)]
    assert ((nibbles[0].int() - nibbles[1].int()) != 0).float().mean() < 0.01  # bitsandbytes' bounds are rounded
    found = gptq(weight, hessian, scales, grid)
    assert hessian.relative_error(weight, found) < 0.7 * hessian.relative_error(weight, alone)
    parts = dict(grid.packed("a.weight", weight, found))
    stats = {name.removeprefix("a.weight."): value for name, value in parts.items() if name != "a.weight"}
    state = QuantState.from_dict(stats, device=torch.device("cpu"))
    assert torch.equal(dequantize_4bit(parts["a.weight"], state), found.to(dtype))
