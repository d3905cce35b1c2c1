"""Vision encoders: pixels -> patch features, and the facts about them that the data pipeline needs.

    pixels_TCHW -> hidden states of one layer -> features_TPV

T tiles, C channels, H height, W width, P image tokens a tile, V the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.config import OpenClipVision, VisionConfig
from models.source import directory_of, read_json
from models.spec import ImageFit, ImageSpec
from models.vision_open_clip import clip_shape, load_open_clip, normalisation

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Family:
    """One encoder class of transformers: its name, and how many tokens stand before its patches."""

    class_name: str
    num_leading_tokens: int


FAMILIES: dict[str, Family] = {
    "clip": Family("CLIPVisionModel", 1),
    "siglip": Family("SiglipVisionModel", 0),
    "dinov2": Family("Dinov2Model", 1),
    "vit": Family("ViTModel", 1),
    "open_clip": Family("CLIPVisionModel", 1),
}


class VisionEncoder(nn.Module):
    """A transformers vision model, of which the hidden states after one layer are the features.

    Layers after that one are not run. While the encoder is frozen it runs without a graph, in its own dtype.
    """

    def __init__(self, model: Any, *, feature_layer: int, num_skipped_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.feature_layer = feature_layer
        self.num_skipped_tokens = num_skipped_tokens

    @property
    def width(self) -> int:
        """V, the width of a feature."""
        return int(self.model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the encoder computes in."""
        return next(self.model.parameters()).dtype

    def forward(self, pixels_TCHW: Tensor) -> Tensor:
        """Features [T, P, V] of normalised pixels."""
        pixels_TCHW = pixels_TCHW.to(self.dtype)
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return self._states(pixels_TCHW)[:, self.num_skipped_tokens :]
        with torch.no_grad(), torch.autocast(pixels_TCHW.device.type, enabled=False):
            return self._states(pixels_TCHW)[:, self.num_skipped_tokens :]

    def _states(self, pixels_TCHW: Tensor) -> Tensor:
        """The hidden states [T, tokens, V] after layer `feature_layer`, counted as `hidden_states` of transformers."""
        total = int(self.model.config.num_hidden_layers)
        num_layers = self.feature_layer % (total + 1)
        if num_layers in (0, total):  # the embedding; or the end, which some families still norm
            states: Tensor = self.model(pixels_TCHW, output_hidden_states=True).hidden_states[num_layers]
            return states
        with _first_layers(self.model, num_layers, total) as last:
            return _output_of(last, lambda: self.model(pixels_TCHW))


@contextmanager
def _first_layers(model: nn.Module, num_layers: int, total: int) -> Iterator[nn.Module]:
    """Let the model have its first layers only, and again all of them afterwards; the last of the first."""
    places = (
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    )
    parent, name, layers = next(places)
    parent._modules[name] = layers[:num_layers]
    try:
        yield layers[num_layers - 1]
    finally:
        parent._modules[name] = layers


def _output_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What `module` returns while `run` runs."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        run()
    finally:
        handle.remove()
    (states,) = found
    return states


def load_vision(config: VisionConfig, dtype: torch.dtype) -> VisionEncoder:
    """The encoder that `config` names, in `dtype`, in evaluation mode."""
    import transformers

    family = FAMILIES[config.kind]
    if isinstance(config, OpenClipVision):
        model = load_open_clip(config, dtype)
    else:
        model_class: Any = getattr(transformers, family.class_name)
        model = model_class.from_pretrained(directory_of(config.path), dtype=dtype)
    skipped = 0 if config.keep_cls else family.num_leading_tokens
    return VisionEncoder(model.eval(), feature_layer=config.feature_layer, num_skipped_tokens=skipped)


def image_spec(config: VisionConfig, fit: ImageFit) -> ImageSpec:
    """What the encoder takes, read from the two JSON files beside its weights (none of the weights is touched)."""
    geometry, mean, std = _facts(config)
    keeps_cls = config.keep_cls and FAMILIES[config.kind].num_leading_tokens > 0
    return ImageSpec(
        size=int(geometry["image_size"]),
        patch_size=int(geometry["patch_size"]),
        fit=fit,
        mean=_triple(mean),
        std=_triple(std),
        num_extra_tokens=FAMILIES[config.kind].num_leading_tokens if keeps_cls else 0,
    )


def _facts(config: VisionConfig) -> tuple[dict[str, Any], Any, Any]:
    """The encoder's config.json, and mean and deviation of the channels."""
    if isinstance(config, OpenClipVision):
        return clip_shape(config), *normalisation(config)
    directory = directory_of(config.path)
    geometry = read_json(directory, "config.json")
    preprocessing = read_json(directory, "preprocessor_config.json")
    mean, std = preprocessing.get("image_mean", CLIP_MEAN), preprocessing.get("image_std", CLIP_STD)
    return geometry.get("vision_config", geometry), mean, std


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
