"""A bundle as stock transformers computes it, one layer in memory at a time.

    config.json --> LlavaForConditionalGeneration without weights, bitsandbytes' linear layers put in where it says so
    files       --> a unit's weights when it runs (tools.bundles.streamed)

Computes in fp32 whatever the files hold, so that two bundles differ by their weights and not by the rounding of what
flows between them. Does not own prompts or what is compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import InputError
from models.export import names_in_file
from models.sharded import TensorFiles
from tools.bundles.streamed import stream, without_weights

QUANTIZED = ("Linear4bit", "Linear8bitLt")


def skeleton(config: Any, settings: Any = None) -> Any:
    """The stock model of a config without weights; `settings` (bitsandbytes') say which layers are its own kind."""
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers import AutoHfQuantizer

    import models.registered  # noqa: F401 - makes our own class known

    with without_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


def open_streamed(directory: Path, device: torch.device) -> Any:
    """The bundle's model on `device`, its weights read from the files as they are needed; its names are checked."""
    from transformers import AutoConfig

    import models.registered  # noqa: F401 - makes our own class known

    config = AutoConfig.from_pretrained(directory)
    files = TensorFiles(directory)
    model = skeleton(config, getattr(config, "quantization_config", None))
    check_names(model, files)
    return stream(model, FromFiles(files, device), device)


def check_names(model: nn.Module, files: TensorFiles) -> None:
    """Raise InputError unless every weight of the model is in the files, and nothing else but quantization's extras."""
    wanted: dict[str, str] = {}
    for name, _ in model.named_parameters():
        wanted[_name_in(files, name)] = name
    for name in files:
        stem = name.partition(".weight.")[0] + ".weight" if ".weight." in name else name
        extras = (f"{name.rpartition('.')[0]}.weight",) if name.endswith((".SCB", ".weight_format")) else ()
        if stem not in wanted and not any(extra in wanted for extra in extras):
            raise InputError(f"{files.directory}: {name} is not a tensor of its model; make the bundle again")


def _name_in(files: TensorFiles, name: str) -> str:
    found = [candidate for candidate in names_in_file(name) if candidate in files]
    if not found:
        raise InputError(f"{files.directory}: no tensor for {name} in its files; make the bundle again")
    return found[0]


class FromFiles:
    """Fetches the weights of a stock model from a bundle's files."""

    def __init__(self, files: TensorFiles, device: torch.device) -> None:
        self._files, self._device = files, device

    def __call__(self, name: str, owner: nn.Module) -> Tensor:
        """The weight in fp32, or as bitsandbytes' own parameter."""
        in_file = _name_in(self._files, name)
        if type(owner).__name__ in QUANTIZED and name.endswith(".weight"):
            return self._quantized(in_file, owner)
        return self._files.read(in_file).to(torch.float32)

    def _quantized(self, name: str, owner: Any) -> nn.Parameter:
        import bitsandbytes

        value = self._files.read(name).to(self._device)
        if type(owner).__name__ == "Linear4bit":
            stats = {
                other.removeprefix(f"{name}."): self._files.read(other)
                for other in self._files
                if other.startswith(f"{name}.")
            }
            made: nn.Parameter = bitsandbytes.nn.Params4bit.from_prequantized(
                data=value, quantized_stats=stats, device=self._device, module=owner
            )
            return made
        scale = self._files.read(f"{name.removesuffix('weight')}SCB").to(self._device)
        return int8_parameter(value, scale)


def int8_parameter(value: Tensor, scale: Tensor) -> nn.Parameter:
    """A `Linear8bitLt`'s weight of quantized values and their scales."""
    import bitsandbytes

    made: nn.Parameter = bitsandbytes.nn.Int8Params(
        value, requires_grad=False, has_fp16_weights=False, CB=value, SCB=scale
    )
    return made
