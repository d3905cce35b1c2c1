"""compressed-tensors' packed integers: which layers have them, their settings in config.json, and their tensors.

    weight on the grid, scales --pack--> NAME.weight_packed, weight_scale, weight_shape --unpack--> the weight

vLLM and transformers (with the package compressed-tensors) read them. vLLM computes q, k, v in one layer, and gate and
up in another: what is computed as one must be packed as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from models.common.errors import InputError

METHOD = "compressed-tensors"
BITS = {"w4a16": 4, "w8a16": 8}
"""Bits of a weight by the name of the format; activations stay as they are."""

GROUP_SIZES = (128, 64, 32)
"""Inputs that share a scale: the largest that divides each layer's. vLLM's kernels take these."""

LEAVES = ("weight_packed", "weight_scale", "weight_shape")
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_IGNORED = (r"re:.*vision_tower.*", r"re:.*multi_modal_projector.*", r"re:.*visual\..*", r"re:.*lm_head$")
_LAYER = re.compile(r"\.language_model\.layers\.\d+\.")


def check_package() -> None:
    """Raise InputError where the package compressed-tensors is not installed."""
    if find_spec("compressed_tensors") is None:
        raise InputError("the package compressed-tensors is needed: pip install 'sightline[w4a16]'")


def layers_to_pack(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the language model's decoder layers, by their full names in stock Llava."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and _LAYER.search(f".{name}")
    }


def group_size(layers: Mapping[str, nn.Linear], where: object) -> int:
    """The largest group size that divides all layers' inputs; raises InputError where none does."""
    widths = sorted({layer.in_features for layer in layers.values()})
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise InputError(
        f"{where}: layers with {', '.join(map(str, widths))} inputs cannot be packed in groups of {GROUP_SIZES[-1]};"
        " `sightline quantize --to int8` can hold them"
    )


def fused_name(name: str) -> str:
    """The name of the layer that vLLM makes of a linear layer and its neighbours."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_FUSED.get(leaf, leaf)}"


def scheme(bits: int, size: int) -> Any:
    """compressed-tensors' settings of a packed layer: symmetric integers, a scale for each group of `size` inputs."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=size)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def settings(packing: Any, whole: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json; the layers `whole`, tower, projector and head are not packed.

    Patterns, since transformers and vLLM call the same layer by different names.
    """
    kept = [rf"re:.*\.{re.escape(name.partition('.language_model.')[2])}$" for name in sorted(whole)]
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [*_IGNORED, *kept],
        "config_groups": {"group_0": packing.model_dump(mode="json", exclude={"format"})},
    }


def pack(name: str, weight: Tensor, scales: Tensor, packing: Any) -> dict[str, Tensor]:
    """The tensors that stand for the weight `name` (which ends in .weight) in a bundle's files."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = compressor.compress({"weight": weight.to(scales.dtype), "weight_scale": scales}, packing)
    return {f"{name.removesuffix('weight')}{leaf}": found[leaf].contiguous() for leaf in LEAVES}


def unpack(parts: Mapping[str, Tensor], given: Any) -> Tensor:
    """The weight of its `LEAVES`; `given` is the `quantization_config` of a config.json."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = given if isinstance(given, dict) else given.to_dict()
    (group,) = settings["config_groups"].values()
    packing = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return compressor.decompress(dict(parts), packing)["weight"]
