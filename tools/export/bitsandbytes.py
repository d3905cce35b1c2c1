"""bitsandbytes' NF4 and int8, one weight at a time: the same files as stock transformers writes, without the model in
memory.

    weight in 16 or 32 bit --> the packed tensors that replace it in a quantized bundle
                           --> how much the layer's output on real inputs changes: its error

Owns which layers are quantized (with `models.languages.nf4`), their errors, and which of them are promoted to 16 bit. A
stock model has one `quantization_config`, whose `llm_int8_skip_modules` keep a layer in 16 bit; it cannot mix 4 and 8
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.languages import nf4
from models.languages.pretrained import quantization
from tools.export.stock import QUANTIZED, int8_parameter

KEPT = (
    *("model.vision_tower", "model.multi_modal_projector", "lm_head", "vision_tower", "multi_modal_projector"),
    *("model.visual", "visual"),  # Qwen-VL's tower with its mergers
)
"""Modules that are not quantized: by their full name in memory for transformers, which without the prefix would not
find them, and without it for vLLM, whose names begin there."""

NUM_SAMPLED_INPUTS = 256
"""Number of positions at which a layer's error is measured, evenly spread over the probes."""


def settings(precision: str, dtype: torch.dtype, whole: list[str]) -> Any:
    """bitsandbytes' configuration with `whole` layers in 16 bit in addition to those that always are."""
    return quantization(precision, dtype, skip=[*KEPT, *whole])


def left_whole(model: nn.Module, precision: str) -> list[str]:
    """Full names in memory of the linear layers that `precision` cannot hold, in a stock model without weights."""
    return nf4.layers_left_whole(model, KEPT) if precision == "nf4" else []


def layers_to_quantize(model: nn.Module, whole: list[str]) -> list[str]:
    """Full names in memory of the linear layers that bitsandbytes quantizes, in a stock model without weights.

    `whole` are those of `left_whole`.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*KEPT, *whole]
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, kept)
    ]


def packed(name: str, value: Tensor, precision: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors that replace the weight `name` in a bundle's files."""
    parameter = quantized_parameter(value, precision, device)
    yield name, parameter.data
    if precision == "int8":
        stem = name.removesuffix("weight")
        yield f"{stem}SCB", parameter.SCB  # type: ignore[attr-defined]
        yield f"{stem}weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    for key, stat in parameter.quant_state.as_dict(packed=True).items():  # type: ignore[attr-defined]
        yield f"{name}.{key}", stat


def quantized_parameter(value: Tensor, precision: str, device: torch.device) -> nn.Parameter:
    """A weight as bitsandbytes' parameter on `device`."""
    import bitsandbytes

    if precision == "int8":
        values, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(value.to(device, torch.float16))
        return int8_parameter(values, scale)
    made: nn.Parameter = bitsandbytes.nn.Params4bit(
        value.to(device), requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(device)
    return made


def dequantized(parameter: Any) -> Tensor:
    """The fp32 weight that a quantized parameter represents."""
    import bitsandbytes

    if hasattr(parameter, "SCB"):
        return parameter.data.float() * (parameter.SCB.float() / 127).unsqueeze(1)
    value: Tensor = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return value.float()


class Quantizing:
    """Fetches a stock model's weights, and quantizes those of bitsandbytes' layers: a trial without writing files."""

    def __init__(
        self, fetch: Callable[[str, nn.Module], Tensor], precision: str, dtype: torch.dtype, device: Any
    ) -> None:
        self._fetch, self._precision, self._dtype, self._device = fetch, precision, dtype, device

    def __call__(self, name: str, owner: nn.Module) -> Tensor:
        """The weight in fp32, or quantized from `dtype`."""
        if type(owner).__name__ in QUANTIZED and name.endswith(".weight"):
            value = self._fetch(name, nn.Identity()).to(self._dtype)
            return quantized_parameter(value, self._precision, self._device)
        return self._fetch(name, owner)


@contextmanager
def measuring(model: nn.Module, names: list[str], precision: str, dtype: torch.dtype) -> Iterator[dict[str, float]]:
    """While the whole model runs, fill the dict with each layer's error: |(W - Q(W)) x| / |W x| over sampled inputs."""
    errors: dict[str, list[Tensor]] = {}
    means: dict[str, float] = {}

    def hook(name: str) -> Any:
        def measure(module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
            x_ND = inputs[0].reshape(-1, inputs[0].shape[-1])
            x_ND = x_ND[:: max(1, len(x_ND) // NUM_SAMPLED_INPUTS)][:NUM_SAMPLED_INPUTS]
            weight = module.weight.data
            change = dequantized(quantized_parameter(weight.to(dtype), precision, weight.device)).sub_(weight)
            moved, whole = F.linear(x_ND, change).norm(), F.linear(x_ND, weight).norm()
            errors.setdefault(name, []).append(moved / whole.clamp(min=1e-30))

        return measure

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield means
        means.update({name: float(torch.stack(values).mean()) for name, values in errors.items()})
    finally:
        for handle in handles:
            handle.remove()


def worst_first(errors: dict[str, float]) -> list[str]:
    """Layers in the order in which they are promoted."""
    return sorted(errors, key=lambda name: -errors[name])
