"""NF4 on every CPU: on those with AVX512-BF16 bitsandbytes can compute some shapes only, and no gradient."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from models.languages.nf4 import fits, layers_left_whole, told
from models.languages.pretrained import PretrainedLanguage
from tests.support.avx512_bf16 import set_flag
from tests.support.backbones import make_language

IDS_BL = torch.tensor([[5, 9, 40, 77, 12]])


@pytest.fixture(params=[False, True], ids=["plain", "avx512_bf16"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU of either kind."""
    set_flag(request.param, monkeypatch.setattr)
    return bool(request.param)


def linear(num_inputs: int, num_outputs: int) -> Any:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        num_inputs, num_outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    return layer.to("cpu").eval()


@pytest.mark.parametrize("shape", [(64, 32), (128, 64), (32, 64), (96, 64), (64, 16), (64, 48)])
def test_what_fits_is_what_bitsandbytes_computes(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with the flag, which is the one that cannot compute all of them."""
    set_flag(True, monkeypatch.setattr)
    layer, x_NI = linear(*shape), torch.ones(3, shape[0], dtype=torch.bfloat16)
    if fits(*shape):
        layer(x_NI)
        return
    with pytest.raises((RuntimeError, AssertionError)):
        layer(x_NI)


def test_layers_that_do_not_fit_are_named() -> None:
    layers = [nn.ModuleDict({"up": nn.Linear(48, 64), "down": nn.Linear(64, 32)}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "other": Conv1D(64, 40), "head": nn.Linear(40, 10)})
    names = layers_left_whole(model, ["head"])
    assert names == ["layers.0.up", "layers.1.up", "other"]
    assert told(names).startswith("3 layers stay whole")
    assert told(names).endswith("layers.*.up (2), other (1)")


def test_a_base_in_nf4_computes_on_every_cpu(cpu: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_language(tmp_path, width=32)
    with caplog.at_level(logging.INFO, "models.languages.pretrained"):
        model = PretrainedLanguage(path=str(tmp_path), load="nf4").load_model(torch.bfloat16)
    with torch.no_grad():
        assert model(IDS_BL).logits.isfinite().all()
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["lm_head"] == kinds["model.layers.0.self_attn.q_proj"] == "Linear"
    assert kinds["model.layers.0.mlp.down_proj"] == "Linear4bit"
    assert "12 layers stay whole" in caplog.text
    assert "model.layers.*.self_attn.q_proj (2)" in caplog.text


def test_validation_takes_no_gradient_away(cpu: bool, tmp_path: Path) -> None:
    """In the order that inference prefers, a layer has no gradient with respect to its inputs."""
    make_language(tmp_path, width=64)
    model = PretrainedLanguage(path=str(tmp_path), load="nf4").load_model(torch.float32)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    embedded_BLD = model.get_input_embeddings()(IDS_BL).detach().requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model(inputs_embeds=embedded_BLD).logits.square().sum(), embedded_BLD)[0]

    before = gradient()
    with torch.no_grad():
        model(inputs_embeds=embedded_BLD.detach())
    assert torch.equal(gradient(), before)
