"""Vision transformers of open_clip, as transformers' `CLIPVisionModel`: the same computation under other names.

    a tag:  open_clip.create_model(architecture, tag).visual --+--names, q, k and v apart--> CLIPVisionModel
    a file: the weights that open_clip saved, visual.*  -------+

So everything after the encoder (feature layers, tuning, merging, stock bundles) is the same as for CLIP, and neither a
bundle nor a file of weights needs open_clip itself, which brings torchvision and timm. Owns the architecture's facts
and the change of names. Encoders of timm, ResNets, attention pooling and the like raise an error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from models.common.documents import read_as
from models.common.errors import InputError, single_line
from models.common.sharded import TensorFiles
from models.common.source import FindPart, PartFacts, read_part, sha256_once
from models.encoders.base import CLIP, EncoderConfig, VisionClass
from models.loading import opening
from models.spec import CLIP_MEAN, CLIP_STD

PLAIN = frozenset({"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"})
"""The keys that the `vision_cfg` of a plain vision transformer may have."""

_Size = Annotated[int, Field(gt=0)]


class _Vision(TypedDict):
    image_size: _Size
    layers: Any  # four numbers for a ResNet, which is named as such
    width: _Size
    patch_size: NotRequired[_Size]
    head_width: NotRequired[_Size]
    mlp_ratio: NotRequired[float]


class _Architecture(TypedDict):
    vision_cfg: _Vision


KNOWN: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}},
}
"""Architectures whose shapes are known without open_clip, from its model_configs/."""


class OpenClipVision(EncoderConfig):
    """A vision transformer of open_clip: `weights` is one of its tags, or a file.

    `architecture` is named as open_clip names it, or a JSON file in its format.
    """

    kind: Literal["open_clip"] = "open_clip"
    architecture: str
    weights: str
    feature_layer: int = -1
    keep_cls: bool = False

    @property
    def vision_class(self) -> VisionClass:
        """CLIP's: the weights are converted to a `CLIPVisionModel` when they are loaded."""
        return CLIP

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """The architecture in the format of a CLIP's config.json."""
        del find
        file = Path(self.weights)
        directory = file.parent if file.is_file() else None
        return PartFacts(clip_facts(self), f"open_clip {self.architecture}", directory)

    def normalisation(self) -> tuple[Any, Any]:
        """open_clip's values for a tag; CLIP's values for a file."""
        if Path(self.weights).is_file():
            return CLIP_MEAN, CLIP_STD
        facts = import_open_clip().get_pretrained_cfg(self.architecture, self.weights)
        return facts.get("mean", CLIP_MEAN), facts.get("std", CLIP_STD)

    def weights_digest(self) -> str | None:
        """The sha256 of the file; None for one of open_clip's tags."""
        file = Path(self.weights)
        return sha256_once(file) if file.is_file() else None

    def load_model(self, dtype: torch.dtype) -> Any:
        """As a `CLIPVisionModel`; raises InputError where the weights are not those of the architecture."""
        return load_open_clip(self, dtype)


def read_architecture(config: OpenClipVision) -> dict[str, Any]:
    """The architecture in open_clip's format; raises InputError where it is not a plain vision transformer."""
    if config.architecture.endswith(".json"):
        try:
            facts: Any = read_as(Path(config.architecture), _Architecture)
        except (OSError, InputError) as error:
            raise InputError(f"model.vision.architecture: {config.architecture}: cannot be read ({error})") from error
    else:
        facts = KNOWN.get(config.architecture) or import_open_clip().get_model_config(config.architecture)
    if facts is None:
        raise InputError(f"model.vision.architecture: open_clip knows no {config.architecture}")
    other = sorted(set(facts["vision_cfg"]) - PLAIN)
    if other or not isinstance(facts["vision_cfg"]["layers"], int):
        raise InputError(f"model.vision.architecture: {config.architecture} is no plain vision transformer: {other}")
    return dict(facts)


def clip_facts(config: OpenClipVision) -> dict[str, Any]:
    """The architecture as the values of a `CLIPVisionConfig`."""
    facts = read_architecture(config)
    vision = facts["vision_cfg"]
    if "patch_size" not in vision:
        raise InputError(f"model.vision.architecture: {config.architecture}: vision_cfg.patch_size: missing")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": int(vision["width"]),
        "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": int(vision["layers"]),
        "num_attention_heads": int(vision["width"]) // int(vision.get("head_width", 64)),
        "image_size": int(vision["image_size"]),
        "patch_size": int(vision["patch_size"]),
        "hidden_act": "quick_gelu" if facts.get("quick_gelu") else "gelu",
    }


def load_open_clip(config: OpenClipVision, dtype: torch.dtype) -> Any:
    """The encoder of the architecture with the weights, as a `CLIPVisionModel` in `dtype`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = clip_facts(config)
    shape.pop("model_type")
    file = Path(config.weights)
    weights = read_visual(file) if file.is_file() else original(config).visual.state_dict()
    model: Any = CLIPVisionModel(CLIPVisionConfig(**shape))
    try:
        model.load_state_dict(renamed(weights, shape["hidden_size"]), strict=True)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = single_line(error)
        raise InputError(f"{config.weights}: not the weights of {config.architecture} ({reason})") from error
    return model.to(dtype).eval()


def read_visual(file: Path) -> dict[str, Tensor]:
    """The vision tower's weights in a file that open_clip saved, .safetensors or a pickle of tensors."""
    if file.suffix == ".safetensors":
        files = TensorFiles.of_file(file)
        state = {name: files.read(name) for name in files}
    else:
        with opening(file, "cannot be loaded", "fetch or copy it again"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    names = {name: name.removeprefix("module.") for name in state}
    return {name.removeprefix("visual."): state[key] for key, name in names.items() if name.startswith("visual.")}


def original(config: OpenClipVision) -> Any:
    """open_clip's own model; raises InputError where it cannot load the weights."""
    open_clip, name = import_open_clip(), config.architecture
    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    try:
        return open_clip.create_model(name, pretrained=config.weights, require_pretrained=True).eval()
    except Exception as error:  # open_clip raises RuntimeErrors, the hub's client a dozen kinds
        reason = single_line(error)
        raise InputError(f"model.vision.weights: open_clip did not load {config.weights!r} ({reason})") from error


def import_open_clip() -> Any:
    """open_clip, which brings torchvision; raises InputError that says how to install it."""
    try:
        import open_clip  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise InputError(f"model.vision.kind=open_clip: pip install 'sightline[open_clip]' ({error})") from error
    except RuntimeError as error:
        raise InputError(f"model.vision.kind=open_clip: torchvision does not fit this torch ({error})") from error
    return open_clip


def renamed(weights: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Weights of open_clip's `VisionTransformer` under the names of `CLIPVisionModel`; the projection is left out."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "proj":
            continue
        if ".attn.in_proj_" in name:
            layer, _, kind = name.partition(".attn.in_proj_")
            prefix = f"{_layer(layer)}.self_attn"
            for part, piece in zip("qkv", value.split(width), strict=True):
                found[f"{prefix}.{part}_proj.{kind}"] = piece
        else:
            found[_name(name)] = value
    return found


_OUTER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
}
_NORMS = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _layer(name: str) -> str:
    return name.replace("transformer.resblocks.", "encoder.layers.")


def _name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    module, _, leaf = name.rpartition(".")
    if module in _NORMS:
        return f"{_NORMS[module]}.{leaf}"
    number, _, inner = module.removeprefix("transformer.resblocks.").partition(".")
    return f"encoder.layers.{number}.{_INNER[inner]}.{leaf}"
