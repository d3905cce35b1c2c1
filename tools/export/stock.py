"""A bundle as stock transformers computes it, one layer in memory at a time.

    config.json --> LlavaForConditionalGeneration without weights, with bitsandbytes' linear layers where it has them
    files       --> a unit's weights when it runs (tools.export.streamed)

Computes in fp32 whatever the files' dtype, so that two bundles differ by their weights and not by the rounding of
activations. Does not own prompts or comparisons.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.common.errors import InputError
from models.common.sharded import TensorFiles
from models.export import names_in_file
from models.languages.nf4 import keep_order
from models.opening import build_model, open_config
from models.published.names import COMPUTED
from tools.export.packed import LEAVES, METHOD, unpack
from tools.export.streamed import stream, without_weights

QUANTIZED = ("Linear4bit", "Linear8bitLt")


def skeleton(config: Any, settings: Any = None) -> Any:
    """The stock model of a config without weights; `settings` (bitsandbytes') select the quantized layers."""
    from transformers.quantizers import AutoHfQuantizer

    with without_weights():
        model = build_model(copy.deepcopy(config), torch.float32)  # a model writes its dtype into its configuration
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        keep_order(model)
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


def open_streamed(directory: Path, device: torch.device) -> Any:
    """The bundle's model on `device`, its weights read from the files as they are needed; its names are checked."""
    config = open_config(directory)
    files = TensorFiles.open(directory)
    settings = getattr(config, "quantization_config", None)
    if is_packed(settings):  # computed from the weights that the integers stand for
        model = skeleton(config)
        check_names(model, files)
        return stream(model, FromPacked(files, settings, FromFiles(files, device), device), device)
    model = skeleton(config, settings)
    check_names(model, files)
    return stream(model, FromFiles(files, device), device)


def is_packed(settings: Any) -> bool:
    """Whether a `quantization_config` is that of compressed-tensors."""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method)) == METHOD


def check_names(model: nn.Module, files: TensorFiles) -> None:
    """Raise InputError unless the files have exactly the model's weights, plus quantization's extra tensors."""
    wanted: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        in_file = name_in_files(files, name)
        wanted[in_file] = name
        if in_file.endswith(f".{LEAVES[0]}"):
            continue  # `unpack` gives the shape that is stored beside it, which `stream` compares
        found, shape = files.stored(in_file).shape, tuple(parameter.shape)
        if found != shape and not any(other.startswith((f"{in_file}.", _scales_of(in_file))) for other in files):
            raise InputError(
                f"{files.directory}: {in_file} has shape {list(found)}, its config.json wants {list(shape)}; "
                "make the bundle again"
            )
    for name in files:
        if _is_spare(name, wanted):
            continue
        stem = name.partition(".weight.")[0] + ".weight" if ".weight." in name else name
        module, _, leaf = name.rpartition(".")
        extras: tuple[str, ...] = (f"{module}.weight",) if leaf in ("SCB", "weight_format") else ()
        extras = (f"{module}.{LEAVES[0]}",) if leaf in LEAVES else extras
        if stem not in wanted and not any(extra in wanted for extra in extras):
            raise InputError(f"{files.directory}: {name} is not a tensor of its model; make the bundle again")


def _is_spare(name: str, wanted: Mapping[str, str]) -> bool:
    """Whether every loader leaves a tensor out: it is computed, or a copy of the embedding."""
    is_head = name.endswith("lm_head.weight") and "lm_head.weight" not in wanted.values()
    return name.endswith(COMPUTED) or is_head


def name_in_files(files: TensorFiles, name: str) -> str:
    """The name that a parameter of a stock class has in these files. Raises InputError where they have none."""
    candidates = [each for whole in names_in_file(name) for each in (whole, f"{whole}_packed")]
    found = [candidate for candidate in candidates if candidate in files]
    if not found:
        raise InputError(f"{files.directory}: no tensor for {name} in its files; make the bundle again")
    return found[0]


def _scales_of(name: str) -> str:
    """The tensor that bitsandbytes writes beside a weight in int8."""
    return f"{name.removesuffix('weight')}SCB"


class FromFiles:
    """Fetches the weights of a stock model from a bundle's files."""

    def __init__(self, files: TensorFiles, device: torch.device) -> None:
        self._files, self._device = files, device

    def __call__(self, name: str, owner: nn.Module) -> Tensor:
        """The weight in fp32, or as bitsandbytes' own parameter."""
        in_file = name_in_files(self._files, name)
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
        scale = self._files.read(_scales_of(name)).to(self._device)
        return int8_parameter(value, scale)


class FromPacked:
    """Fetches the weights of a stock model from packed integers where files have them, else as `plain` does.

    The layers whose names in files are in `whole` are not taken from the packed ones.
    """

    def __init__(
        self, files: TensorFiles, settings: Any, plain: FromFiles, device: torch.device, whole: Collection[str] = ()
    ) -> None:
        self._files, self._settings, self._plain, self._device = files, settings, plain, device
        self._whole = whole

    def __call__(self, name: str, owner: nn.Module) -> Tensor:
        """The weight in fp32."""
        for in_file in names_in_file(name):
            if f"{in_file}_packed" in self._files and in_file not in self._whole:
                stem = in_file.removesuffix("weight")
                parts = {leaf: self._files.read(f"{stem}{leaf}").to(self._device) for leaf in LEAVES}
                return unpack(parts, self._settings).float()
        return self._plain(name, owner)


def int8_parameter(value: Tensor, scale: Tensor) -> nn.Parameter:
    """A `Linear8bitLt`'s weight of quantized values and their scales."""
    import bitsandbytes

    made: nn.Parameter = bitsandbytes.nn.Int8Params(
        value, requires_grad=False, has_fp16_weights=False, CB=value, SCB=scale
    )
    return made
