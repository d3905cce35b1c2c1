"""Our class in transformers, for what its own have no place for: projectors that make other tokens than features.

`SightlineForConditionalGeneration` is `LlavaForConditionalGeneration` with one of `models.projectors` in it, and its
config is Llava's with that projector's values. Importing this module registers both with transformers' Auto classes,
the weights in the names of the classic hub layout; `import sightline` does so as soon as transformers is imported.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from models.config import ProjectorConfig, QFormerProjector
from models.projectors import PROJECTORS
from models.projectors.qformer import QFormer

MODEL_TYPE = "sightline"


class SightlineConfig(LlavaConfig):
    """Llava's config, with the values of the projector and, for a Q-Former, of its text encoder's config.json."""

    model_type = MODEL_TYPE
    projector: dict[str, Any] | None = None
    projector_text: dict[str, Any] | None = None


class SightlineForConditionalGeneration(LlavaForConditionalGeneration):
    """Forward, cache and generate are Llava's."""

    config_class = SightlineConfig

    def __init__(self, config: SightlineConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = _projector(config)


def _projector(config: SightlineConfig) -> Any:
    # A config's lists were tuples, which strict decoding of Python values would refuse; JSON has lists alone.
    values = TypeAdapter(ProjectorConfig).validate_python(config.projector, strict=False)
    widths = int(config.vision_config.hidden_size), int(config.text_config.hidden_size)
    if isinstance(values, QFormerProjector):
        assert config.projector_text is not None
        return QFormer(values, *widths, config.projector_text, with_text=False)
    return PROJECTORS[values.kind](values, *widths)


def _register() -> None:
    AutoConfig.register(MODEL_TYPE, SightlineConfig)
    AutoModelForImageTextToText.register(SightlineConfig, SightlineForConditionalGeneration)
    register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("llava"))


_register()
