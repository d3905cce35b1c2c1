"""Which published VLMs can start a run, and what their config.json says of their parts.

    config.json --family--> transformers' configuration --> that of the tower, of the language model

Owns the table of families and the refusals. Does not own pixels (`image`) or weights. Imports transformers when a
configuration is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, read_part
from models.loading import opening

NATIVE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Those of `FAMILIES` whose images keep their size and proportions."""

FAMILIES = ("llava", "llava_next", "llava_onevision", "sightline", "sightline_next", *NATIVE_FAMILIES)
"""`model_type` of the configurations that fall apart into tower, projector and language model."""

_EXPERTS = "its layers have experts, which are not trained here"
_RECURRENT = "its layers are recurrent, so packed samples would see each other"
_NOT_CAUSAL = "its attention is not causal inside an image"
_REASONS: Mapping[str, str] = {
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
    "gemma3": _NOT_CAUSAL,
    "gemma4": _NOT_CAUSAL,
    "internvl": "its tower and its pixel shuffle are not known here",
    "idefics3": "its connector and its tiles are not known here",
    "smolvlm": "its connector and its tiles are not known here",
    "mllama": "its language model attends to images in layers of their own",
    "paligemma": "its attention is not causal in the prompt",
}
_NEAREST = (
    "open are LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL and Qwen3-VL as transformers has them, and"
    " bundles of this program; for other parts name three directories (model.vision, model.projector, model.language)"
)


@dataclass(frozen=True)
class PublishedFacts:
    """A published VLM's configuration, and where it was found."""

    config: Any
    """Of transformers, or of `models.registered`."""
    source: str
    directory: Path | None
    """None: not on this machine."""

    @property
    def family(self) -> str:
        """Its `model_type`, one of FAMILIES."""
        return str(self.config.model_type)

    @property
    def has_heads(self) -> bool:
        """Whether it has heads for further tokens."""
        return getattr(self.config, "future", None) is not None


def read_published(path: str, find: FindPart = read_part) -> PublishedFacts:
    """The configuration of the VLM at `path` (a directory or a hub name); no weight is read.

    Raises:
        InputError: it cannot start a run; the line has the class, the reason and what can.
    """
    found = _checked(path, find)
    return PublishedFacts(_decoded(dict(found.config), found.source), found.source, found.directory)


def family_of(path: str, find: FindPart = read_part) -> str:
    """`PublishedFacts.family` of the VLM at `path`. Cheap: transformers' configuration, which takes 20 ms, is not made.

    Raises:
        InputError: as `read_published`, for what the configuration's values say by themselves.
    """
    return str(_checked(path, find).config["model_type"])


def _checked(path: str, find: FindPart) -> PartFacts:
    """What is at `path`, of a family that can start a run."""
    found = find(path)
    _check_values(found.config, found.source)
    if "quantization_config" in found.config:
        raise InputError(
            f"{found.source}: quantized weights cannot be trained; name the bundle or model that they were made from,"
            " and model.load: nf4 or int8 to hold it so in memory"
        )
    return found


def check_family(directory: Path) -> None:
    """Raise InputError where the model in a directory is none of FAMILIES, naming class, reason and what is open."""
    _check_values(read_json(directory, "config.json"), str(directory / "config.json"))


def _check_values(values: Mapping[str, Any], source: str) -> None:
    kind = str(values.get("model_type", "no model_type"))
    shown = next(iter(values.get("architectures") or []), kind)
    if "mm_vision_tower" in values:
        raise InputError(
            f"{source}: {shown} is the original LLaVA's layout, not transformers'; name its tower and its language"
            " model, with model.projector.weights: .../mm_projector.bin, or take the llava-hf directory of that model"
        )
    if kind not in FAMILIES:
        reason = _REASONS.get(kind, "its parts are not known here")
        raise InputError(f"{source}: {shown} is not opened: {reason}; {_NEAREST}")


def _decoded(values: dict[str, Any], source: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from models.registered import register

    register()
    with opening(Path(source), "is not understood", "fetch or copy it again"):
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    if not isinstance(getattr(config, "vision_feature_layer", -1), int):
        raise InputError(
            f"{source}: vision_feature_layer is {config.vision_feature_layer}: features of several layers are not"
            " trained here; take a model with one"
        )
    return config
