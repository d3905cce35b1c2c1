"""An int8 layer inside a model moves whole."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models.quantized import follow_weights, tell_casts_once
from models.vlm import VLM

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantized() -> Any:
    """A model around bitsandbytes' layer, whose weight has been quantized."""
    model: Any = VLM.__new__(VLM)
    nn.Module.__init__(model)
    model.layer = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    model.layer.weight = model.layer.weight.to("cpu")
    assert model.layer.weight.dtype == torch.int8
    return model


@pytest.mark.parametrize("has_run", [False, True])
def test_a_moved_model_multiplies_with_the_moved_weight(has_run: bool) -> None:
    """A copy stands for another device: torch gives it to the parameter, and bitsandbytes keeps the old one beside."""
    x = torch.randn(2, 8)
    plain, ours = quantized().eval(), quantized().eval()
    for model in (plain, ours):
        if has_run:
            model.layer(x)  # puts values and scales into the layer's state
    nn.Module._apply(plain, torch.clone)
    before, kept = ours.layer.weight.data_ptr(), (plain.layer.weight, plain.layer.state)[has_run]
    assert kept.CB.data_ptr() != plain.layer.weight.data_ptr(), "else bitsandbytes has mended it: drop follow_weights"
    ours._apply(torch.clone)
    kept = (ours.layer.weight, ours.layer.state)[has_run]
    assert kept.CB.data_ptr() == ours.layer.weight.data_ptr() != before


def test_what_is_cast_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not in every product: the records of two layers, twice each, in one dtype and in another."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for earlier in list(logger.filters):
        logger.removeFilter(earlier)
    layers = nn.Sequential(quantized().layer, quantized().layer).eval()

    def said() -> int:
        caplog.clear()
        for dtype in (torch.bfloat16, torch.float32):
            for _ in range(2):
                layers(torch.randn(2, 8, dtype=dtype))
        return sum("will be cast" in record.getMessage() for record in caplog.records)

    assert said() == 8, "bitsandbytes says it otherwise now: is tell_casts_once still needed?"
    tell_casts_once()
    tell_casts_once()
    assert said() == 2


class Linear8bitLt(nn.Module):
    """Named as bitsandbytes' layer, with a weight that has gone to another device and scales that have not."""

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        self.weight: Any = nn.Parameter(torch.zeros(8, 8, dtype=dtype, device="meta"), requires_grad=False)
        self.weight.CB, self.weight.SCB = torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8)
        self.state: Any = SimpleNamespace(CB=None, SCB=torch.zeros(8))


def test_scales_go_where_the_weight_is() -> None:
    layer = Linear8bitLt()
    follow_weights(nn.Sequential(layer))
    assert {layer.weight.CB.device.type, layer.weight.SCB.device.type, layer.state.SCB.device.type} == {"meta"}
    assert layer.state.CB is None
    waiting = Linear8bitLt(torch.float16)  # is quantized when it moves by itself
    follow_weights(waiting)
    assert waiting.weight.SCB.device.type == "cpu"


def test_a_model_with_adapters_moves() -> None:
    """peft's adapter over such a layer has a class of the same name, without a state."""
    from peft import LoraConfig, inject_adapter_in_model

    model, x = quantized().eval(), torch.randn(3, 8)
    before = model.layer(x)
    model.is_loaded_in_8bit = True  # as transformers says of a model
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"]), model)
    assert type(model.layer).__name__ == "Linear8bitLt"
    assert torch.equal(model.to("cpu").layer(x), before)


def test_moving_to_where_it_is_changes_no_answer() -> None:
    model, x = quantized().eval(), torch.randn(3, 8)
    before = model.layer(x)
    assert torch.equal(model.to("cpu").layer(x), before)
    model.half()
    assert model.layer.weight.dtype == torch.int8


def test_nobody_is_asked_to_install_what_would_download() -> None:
    """bitsandbytes asks on processors with bf16 units alone."""
    done = subprocess.run([sys.executable, "-c", "import models, peft"], capture_output=True, text=True, check=True)
    assert "pip install" not in done.stderr
