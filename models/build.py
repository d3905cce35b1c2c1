"""From the model part of a recipe to a model: specs first (no weights), then the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.config import ModelConfig, PretrainedLanguage, TransformersVision
from models.language import load_language, load_tokenizer, text_spec
from models.projectors import build_projector
from models.spec import AnyResImage, ImageSpec, TextSpec
from models.vision import image_spec, load_vision
from models.vlm import VLM


@dataclass(frozen=True)
class Facts:
    """What the data pipeline needs to know of a model: cheap to get, no weights are read."""

    tokenizer: Any
    image: ImageSpec
    text: TextSpec


def read_facts(config: ModelConfig, max_length: int) -> Facts:
    """Tokenizer, image and text specs of the model that `config` describes."""
    assert isinstance(config.vision, TransformersVision), "trainer.built names what is missing"
    assert isinstance(config.language, PretrainedLanguage)
    assert not isinstance(config.image, AnyResImage)
    tokenizer = load_tokenizer(config.language)
    return Facts(
        tokenizer=tokenizer,
        image=image_spec(config.vision, config.image),
        text=text_spec(config.language, tokenizer, max_length),
    )


def build_vlm(config: ModelConfig, facts: Facts, *, frozen_dtype: torch.dtype, seed: int) -> VLM:
    """The whole model with pretrained parts in `frozen_dtype`; the projector is new, in fp32, drawn from `seed`.

    The same seed gives the same projector on every rank; torch's global generator is left as it was.
    """
    assert isinstance(config.vision, TransformersVision)
    assert isinstance(config.language, PretrainedLanguage)
    vision = load_vision(config.vision, frozen_dtype)
    language = load_language(config.language, frozen_dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector(config.projector, vision.width, int(language.config.hidden_size))
    return VLM(vision, projector, language, image=facts.image, text=facts.text)
