"""A vision encoder for pictures of another size: its position embeddings are interpolated once, by transformers' rule.

So the size in config.json is the size that is trained and served, and nothing is interpolated again in each forward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.documents import read_json
from models.common.errors import InputError
from models.encoders.pretrained import PREPROCESSOR, VISION_CLASSES

_KINDS = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov3_vit": "dinov3",
    "internvl_vision": "internvit",
}
"""Kinds of VISION_CLASSES whose `model_type` is another word."""


def write_resized(source: Path, out: Path, size: int) -> str:
    """Write the vision encoder of the directory `source` for pictures of `size` pixels into `out`.

    Raises:
        InputError: no vision encoder that recipes know, or a size that its patches do not divide.
    """
    import transformers

    facts = read_json(source, "config.json")
    kind = str(facts.get("model_type"))
    kind = _KINDS.get(kind, kind)
    if kind not in VISION_CLASSES:
        raise InputError(f"{source}: {kind} is no vision encoder of {', '.join(VISION_CLASSES)}")
    preprocessing = read_json(source, PREPROCESSOR)
    model_class: Any = getattr(transformers, VISION_CLASSES[kind].class_name)
    model = model_class.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    before = _edge(model.config.image_size)
    resized(model, size).save_pretrained(out)
    (out / PREPROCESSOR).write_text(json.dumps(sized(preprocessing, size), indent=2) + "\n", encoding="utf-8")
    return f"{source}: pictures of {size} pixels instead of {before}"


def sized(preprocessing: dict[str, Any], size: int) -> dict[str, Any]:
    """The values of a preprocessor_config.json for squares of `size` pixels."""
    return {
        **preprocessing,
        "do_resize": True,
        "do_center_crop": True,
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }


def resized(model: Any, size: int) -> Any:
    """A vision model of transformers for squares of `size` pixels, of the same class and other weights unchanged.

    Raises:
        InputError: `size` is no multiple of a patch.
    """
    patch = _edge(model.config.patch_size)
    if size % patch:
        raise InputError(f"--image-size {size}: no multiple of the encoder's patches of {patch} pixels")
    weights: dict[str, Tensor] = dict(model.state_dict())
    # DINOv3 rotates by positions that it computes, and has no table of them.
    for name in [name for name in weights if name.endswith(("position_embeddings", "position_embedding.weight"))]:
        weights[name] = _interpolated(model, weights[name], size, size // patch)
    is_single = isinstance(model.config.image_size, int)
    sizes = {"image_size": size if is_single else [size, size]}
    config = type(model.config).from_dict({**model.config.to_dict(), **sizes})
    other = type(model)(config)
    other.load_state_dict(weights, strict=True)
    return other.to(model.dtype).eval()


def _interpolated(model: Any, table: Tensor, size: int, num_patches: int) -> Tensor:
    """A table of positions [..., P, D] for squares of `size` pixels, which are `num_patches` patches wide."""
    embeddings = next(module for module in model.modules() if hasattr(module, "interpolate_pos_encoding"))
    num_positions, width = table.shape[-2:]
    num_leading = num_positions - math.isqrt(num_positions) ** 2  # a CLS token, or none
    with torch.no_grad():
        sequence = torch.empty(1, num_leading + num_patches**2, width)
        positions: Tensor = embeddings.interpolate_pos_encoding(sequence, size, size)
    return positions.view(*table.shape[:-2], -1, width).contiguous()


def _edge(size: int | Sequence[int]) -> int:
    """One side of a square; InternViT's configuration says both."""
    return int(size) if isinstance(size, int) else int(size[0])
