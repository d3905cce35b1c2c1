"""Our classes in transformers, for what its own have no place for.

`SightlineForConditionalGeneration` is `LlavaForConditionalGeneration` with one of `models.projectors` in it, with heads
for future tokens beside it, or over our own decoder; its config is Llava's with those parts' values.
`SightlineNextForConditionalGeneration` is the same of LLaVA-NeXT. Importing this module registers all with
transformers' Auto classes, the weights in the names of the classic hub layout; `import sightline` does so as soon as
transformers is imported.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

import models.own_decoder  # noqa: F401 - makes its configuration known
from models.config import FutureConfig, ProjectorConfig, QFormerProjector
from models.future import build_future
from models.projectors import PROJECTORS
from models.projectors.qformer import QFormer


class SightlineConfig(LlavaConfig):
    """Llava's config, with the values of our parts and, for a Q-Former, of its text encoder's config.json."""

    model_type = "sightline"
    projector: dict[str, Any] | None = None
    projector_text: dict[str, Any] | None = None
    future: dict[str, Any] | None = None


class SightlineNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's config, with the values of our parts; AnyRes goes with stock projectors alone."""

    model_type = "sightline_next"
    future: dict[str, Any] | None = None


class SightlineForConditionalGeneration(LlavaForConditionalGeneration):
    """Forward, cache and generate are Llava's."""

    config_class = SightlineConfig

    def __init__(self, config: SightlineConfig) -> None:
        super().__init__(config)
        if config.projector is not None:
            self.model.multi_modal_projector = _projector(config)
        self.future = _future(config)


class SightlineNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """Forward, cache and generate are LLaVA-NeXT's."""

    config_class = SightlineNextConfig

    def __init__(self, config: SightlineNextConfig) -> None:
        super().__init__(config)
        self.future = _future(config)


def _future(config: Any) -> Any:
    if config.future is None:
        return None
    values = TypeAdapter(FutureConfig).validate_python(config.future, strict=False)
    return build_future(values, config.text_config)


def _projector(config: SightlineConfig) -> Any:
    # A config's lists were tuples, which strict decoding of Python values would refuse; JSON has lists alone.
    values = TypeAdapter(ProjectorConfig).validate_python(config.projector, strict=False)
    widths = int(config.vision_config.hidden_size), int(config.text_config.hidden_size)
    if isinstance(values, QFormerProjector):
        assert config.projector_text is not None
        return QFormer(values, *widths, config.projector_text, with_text=False)
    return PROJECTORS[values.kind](values, *widths)


def _register() -> None:
    for base, config_class, model_class in (
        ("llava", SightlineConfig, SightlineForConditionalGeneration),
        ("llava_next", SightlineNextConfig, SightlineNextForConditionalGeneration),
    ):
        AutoConfig.register(config_class.model_type, config_class)
        AutoModelForImageTextToText.register(config_class, model_class)
        register_checkpoint_conversion_mapping(config_class.model_type, get_checkpoint_conversion_mapping(base))


_register()
