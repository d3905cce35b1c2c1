"""transformers classes for models that the stock classes cannot represent.

`SightlineForConditionalGeneration` is `LlavaForConditionalGeneration` with a projector of ours or of another package in
it, with added heads for future tokens, or over our own decoder; its config is Llava's with those parts' values.
`SightlineNextForConditionalGeneration` is the same for LLaVA-NeXT. `register` adds all of them to transformers' Auto
classes, with weights under the names of the classic hub layout; `sightline.register` is that function.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

import models.scratch_decoder  # noqa: F401 - makes its configuration known
from models.mtp.base import MTP_HEADS
from models.mtp.heads import build_heads
from models.projectors.base import PROJECTORS
from models.scaled_head import is_scaled, scaled


class SightlineConfig(LlavaConfig):
    """Llava's config, with the values of our parts and, for a Q-Former, of its text encoder's config.json.

    `packages` maps an entry-point group to the package that a part comes from, where it is not ours.
    `num_register_tokens`: how many of the tower's tokens behind its class token are registers, which are no features.
    """

    model_type = "sightline"
    projector: dict[str, Any] | None = None
    projector_text: dict[str, Any] | None = None
    future: dict[str, Any] | None = None
    num_register_tokens: int | None = None
    packages: dict[str, str] | None = None


class SightlineNextConfig(LlavaNextConfig):
    """LLaVA-NeXT's config, with the values of our parts."""

    model_type = "sightline_next"
    projector: dict[str, Any] | None = None
    projector_text: dict[str, Any] | None = None
    future: dict[str, Any] | None = None
    num_register_tokens: int | None = None
    packages: dict[str, str] | None = None


class SightlineForConditionalGeneration(LlavaForConditionalGeneration):
    """Llava with our parts; forward, cache and generate are inherited."""

    config_class = SightlineConfig

    def __init__(self, config: SightlineConfig) -> None:
        super().__init__(config)
        _put_own_parts(self, config)


class SightlineNextForConditionalGeneration(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with our parts; forward, cache and generate are inherited."""

    config_class = SightlineNextConfig

    def __init__(self, config: SightlineNextConfig) -> None:
        super().__init__(config)
        _put_own_parts(self, config)


def _put_own_parts(model: Any, config: Any) -> None:
    """Replace Llava's projector, and return the heads for further tokens; None where there are none.

    Raises InputError where no installed package has a part of that kind.
    """
    if is_scaled(config.text_config):  # stock Llava's head is the matrix alone
        model.lm_head.register_forward_hook(lambda _head, _inputs, logits: scaled(logits, config.text_config))
    num_registers = config.num_register_tokens
    packages = config.packages or {}
    if config.projector is not None:
        widths = int(config.vision_config.hidden_size), int(config.text_config.hidden_size)
        projector = PROJECTORS.decode(config.projector, packages.get(PROJECTORS.group))
        model.model.multi_modal_projector = projector.build_exported(*widths, config)
    if num_registers:  # stock Llava drops one token before the patches
        projector = model.model.multi_modal_projector
        projector.register_forward_pre_hook(lambda _projector, inputs: (inputs[0][:, num_registers:], *inputs[1:]))
    model.future = None
    if config.future is not None:
        model.future = build_heads(MTP_HEADS.decode(config.future, packages.get(MTP_HEADS.group)), config.text_config)


OWN_CONFIGS = (SightlineConfig, SightlineNextConfig)
"""The configurations of bundles that stock transformers does not know."""


@lru_cache(maxsize=1)
def register() -> None:
    """Register our classes with transformers' Auto classes; repeated calls change nothing."""
    for base, config_class, model_class in (
        ("llava", SightlineConfig, SightlineForConditionalGeneration),
        ("llava_next", SightlineNextConfig, SightlineNextForConditionalGeneration),
    ):
        AutoConfig.register(config_class.model_type, config_class)
        AutoModelForImageTextToText.register(config_class, model_class)
        register_checkpoint_conversion_mapping(config_class.model_type, get_checkpoint_conversion_mapping(base))
