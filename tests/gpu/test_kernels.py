"""Kernels: packed attention against one call a sample, quantized layers that move, a recorded decode, copies ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.feed import feed
from eval.predictor import Predictor, Query, Turn
from models.attention import ONE_BY_ONE, Segments, attend, choose_kernel
from models.quantized import follow_weights
from tests.data_pipeline.test_feed import TEXT, parts
from tests.eval.test_generation import SHORT
from tests.support.bundles import image, make_bundle
from trainer.engine.determinism import set_determinism

LENGTHS = (5, 300, 1, 129)
HEADS = [(4, 4), (8, 2), (6, 1)]
GRAIN = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Of results near 1: the dtype's own rounding, a few times over."""


def attended(device: str, dtype: torch.dtype, heads: tuple[int, int]) -> list[Tensor]:
    """The result and three gradients, for the same numbers on each device and in each dtype."""
    random = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    states = [torch.randn(1, count, total, 64, generator=random) for count in (heads[0], heads[1], heads[1])]
    states = [each.bfloat16().to(dtype).to(device).requires_grad_() for each in states]
    weight = torch.randn(1, total, heads[0], 64, generator=random).bfloat16().to(dtype).to(device)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    segments = Segments.of(starts, LENGTHS)
    query, key, value = states
    out, _ = attend(nn.Identity(), query, key, value, None, scaling=0.125, segments=segments)
    return [each.detach().float().cpu() for each in (out, *torch.autograd.grad((out * weight).sum(), states))]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", list(GRAIN), ids=str)
def test_packed_attention_is_one_call_a_sample(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    for found, expected in zip(attended("cuda", dtype, heads), attended("cpu", torch.float32, heads), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=GRAIN[dtype])


def test_the_packed_kernel_is_chosen_where_it_runs() -> None:
    name, kernel = choose_kernel(torch.device("cuda"))
    assert (kernel is not None) == (torch.cuda.get_device_capability() >= (8, 0))
    assert kernel is not None or name == ONE_BY_ONE


def test_deterministic_attention_gives_the_same_bits_again() -> None:
    set_determinism(True)
    try:
        first = attended("cuda", torch.bfloat16, (8, 2))
        for _ in range(5):
            again = attended("cuda", torch.bfloat16, (8, 2))
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    finally:
        set_determinism(False)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_layer_moves_whole(kind: str) -> None:
    """There and back; the answer is that of the dequantized weight."""
    bnb = pytest.importorskip("bitsandbytes")
    layer: Any = (
        bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        if kind == "int8"
        else bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float16, quant_type="nf4")
    )
    weight = layer.weight.data.clone()
    model = nn.Sequential(layer).to("cuda")
    follow_weights(model)
    x = torch.randn(3, 64, dtype=torch.float16, device="cuda")
    expected = x @ weight.to("cuda", torch.float16).T
    before = model(x)
    torch.testing.assert_close(before, expected, rtol=0, atol=0.15 * float(expected.abs().max()))
    model.to("cpu")
    follow_weights(model)
    model.to("cuda")
    follow_weights(model)
    torch.testing.assert_close(model(x), before)


def decode(device: str, folder: Path) -> None:
    recorded = Predictor.open(make_bundle(folder / "bundle"), device=device)
    plain = Predictor(recorded.model, recorded.processor, device=device)
    query = Query((image(),), (Turn("user", "What is it?"),))
    for _ in range(2):
        assert recorded.answer([query], SHORT) == plain.answer([query], SHORT)
    assert recorded._pool is not None
    assert recorded._pool._idle[0]._graphs


def test_a_recorded_decode_answers_as_a_plain_one(tmp_path: Path) -> None:
    decode("cuda:0", tmp_path)


@pytest.mark.multi
def test_it_is_recorded_and_replayed_on_a_device_that_is_not_the_current_one(tmp_path: Path) -> None:
    decode("cuda:1", tmp_path)
    assert torch.cuda.current_device() == 0


def test_the_next_batch_is_copied_while_this_one_computes(tmp_path: Path) -> None:
    """The host hands on batch 2, and begins to copy batch 3, while a computation on batch 1 of a second goes on."""
    device = torch.device("cuda")
    batches = feed(parts(tmp_path / "set")[:3], TEXT, device)
    next(batches)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    computed = torch.cuda.Event()
    computed.record()
    second = next(batches)
    assert second.device == torch.device("cuda", 0)
    assert not computed.query(), "the host waited for the computation, or the copy did"
