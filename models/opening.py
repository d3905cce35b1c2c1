"""Opens a bundle: the one place where transformers' Auto classes read its configuration, its processor and its model.

Our own classes (`models.registered`) are registered first. Nothing is downloaded, no code in the directory is run, and
weights must be safetensors. Errors name the directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.torchvision import check_torchvision
from models.languages.nf4 import keep_order
from models.loading import load_whole, opening

if TYPE_CHECKING:
    import torch

_ADVICE = "make it again with tools.merge"
_WITH_VIDEO = {
    "llava_onevision": ("models.onevision", "ImagesOnlyProcessor"),
    "qwen2_vl": ("models.native.processors", "Qwen2VLImagesProcessor"),
    "qwen2_5_vl": ("models.native.processors", "Qwen2_5_VLImagesProcessor"),
    "qwen3_vl": ("models.native.processors", "Qwen3VLImagesProcessor"),
}
"""Families whose processors transformers opens with torchvision alone -> (module, class) of one for images alone."""


def needs_torchvision(model_type: str) -> bool:
    """Whether transformers opens a family's own processor with torchvision alone."""
    return model_type in _WITH_VIDEO


def open_config(directory: Path) -> Any:
    """The configuration; raises InputError where it does not open."""
    from transformers import AutoConfig

    with _opening(directory):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def open_processor(directory: Path, backend: Literal["pil", "torchvision"] = "pil") -> Any:
    """The processor, whose pixels Pillow makes as in training; raises InputError where it does not open.

    Where torchvision is installed, transformers would take it by itself, whose pixels differ by 2 levels of 255. Only
    the parity report opens it, to say by how much.
    """
    from transformers import AutoProcessor

    with _opening(directory):
        opener = _images_only(directory) or AutoProcessor
        return opener.from_pretrained(directory, local_files_only=True, trust_remote_code=False, backend=backend)


def _images_only(directory: Path) -> Any:
    """The class to open the processor with where its own has a part for videos; else None.

    Also where torchvision is installed: the directory may lack the file of that part, and nobody here asks for it.
    """
    found = _WITH_VIDEO.get(read_json(directory, "config.json").get("model_type", ""))
    if found is None:
        return None
    module, name = found
    return getattr(import_module(module), name)


def open_model(directory: Path, device: torch.device) -> Any:
    """The model on `device` in evaluation mode, in the dtype of its configuration.

    On a GPU convolutions of fp32 numbers, such as those of the tower's patches, are not rounded to 10 bits from now on,
    which cuDNN does by default. Raises InputError where it does not open.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # as `trainer.engine.process_group` does for training
    with _opening(directory):
        model = load_whole(
            AutoModelForImageTextToText.from_pretrained,
            directory,
            advice=_ADVICE,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            device_map={"": device},
            **_unpacked(directory),
        )
    keep_order(model, only_what_does_not_fit=True)  # of a bundle in which such layers were quantized
    return model.eval()


def _unpacked(directory: Path) -> dict[str, Any]:
    """The argument by which packed integers become weights while a model is loaded.

    transformers would do it at the first call of the whole model, and whoever calls a part of it would find no weights.
    """
    from transformers import CompressedTensorsConfig
    from transformers.utils.quantization_config import QuantizationMethod

    settings = getattr(open_config(directory), "quantization_config", None) or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    if method != QuantizationMethod.COMPRESSED_TENSORS:
        return {}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def open_language(directory: Path, dtype: torch.dtype) -> Any:
    """A causal language model in `dtype` on the CPU, in evaluation mode; raises InputError where it does not open."""
    from transformers import AutoModelForCausalLM

    model = load_whole(
        AutoModelForCausalLM.from_pretrained,
        directory,
        advice="fetch or copy it again",
        local_files_only=True,
        trust_remote_code=False,
        dtype=dtype,
        attn_implementation="sdpa",
    )
    return model.eval()


def put_adapter(model: Any, directory: Path) -> Any:
    """The model with the peft adapter in `directory` in its layers; `model` itself is changed.

    Raises:
        InputError: it does not open, or a tensor of it has no place in the model (peft only warns of that).
    """
    from peft import PeftModel

    from models.common.sharded import TensorFiles

    stored = len(list(TensorFiles.of_file(directory / "adapter_model.safetensors")))  # peft takes a pickle otherwise
    marks = (".lora_", ".modules_to_save.")
    with opening(directory, "does not open as an adapter of peft", "export it again"):
        adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    inside = sum(any(mark in name for mark in marks) for name, _ in adapted.named_parameters())
    if inside != stored:
        raise InputError(f"{directory}: {stored} tensors in the adapter, {inside} in the model; is it another base?")
    return adapted.get_base_model().eval()


def build_model(config: Any, dtype: torch.dtype) -> Any:
    """A model of this configuration with random weights in `dtype`, from torch's global generator."""
    from transformers import AutoModelForImageTextToText

    from models.registered import register

    register()
    return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)


@contextmanager
def _opening(directory: Path) -> Iterator[None]:
    check_torchvision()
    from models.registered import register

    register()
    with opening(directory, "does not open as a bundle", _ADVICE):
        yield
