"""The fast dropout drops the share it is told, keeps the mean, and draws the same mask for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.dropout import FastDropout, use_fast_dropout


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_share_scale_and_gradient(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(3, 401, 83, dtype=dtype, requires_grad=True)  # no multiple of four
    out = FastDropout(p)(x)
    dropped = float((out == 0).double().mean())
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)  # five standard deviations
    kept = out[out != 0]
    # p is rounded to 1/65,536, and the result to the dtype.
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2**-16 + torch.finfo(dtype).eps, atol=0.0)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_neighbours_are_independent() -> None:
    """Four elements share a word of the generator."""
    torch.manual_seed(0)
    is_dropped = (FastDropout(0.5)(torch.ones(100_000, 4)) == 0).double()
    assert torch.corrcoef(is_dropped.T).fill_diagonal_(0.0).abs().max() < 0.02


def test_the_seed_decides_the_mask_and_a_recomputation_repeats_it() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    dropout = FastDropout(0.3)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        out = checkpoint(lambda given: dropout(given) * given, x, use_reentrant=False)
        found += [out.detach(), *torch.autograd.grad(out.sum(), x)]
    torch.manual_seed(1)
    plain = dropout(x) * x
    found += [plain.detach(), *torch.autograd.grad(plain.sum(), x)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[1], found[5])


def test_evaluation_changes_nothing_and_only_dropouts_are_replaced() -> None:
    x = torch.randn(5)
    assert FastDropout(0.5).eval()(x) is x
    layer = nn.Module()
    layer.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1), "other": nn.Identity()})
    use_fast_dropout(layer)
    assert isinstance(layer.lora_dropout["default"], FastDropout)
    assert layer.lora_dropout["default"].p == 0.1
    assert isinstance(layer.lora_dropout["other"], nn.Identity)
