"""From the model part of a recipe to a model: specs first (no weights), then the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from models.anyres import with_newline
from models.config import (
    DecoderLanguage,
    LinearProjector,
    MlpProjector,
    ModelConfig,
    PretrainedLanguage,
    ProjectorConfig,
    QFormerProjector,
)
from models.errors import InputError
from models.future import build_future
from models.language import (
    build_decoder,
    decoder_shape,
    decoder_text_spec,
    load_encoder_tokenizer,
    load_language,
    load_tokenizer,
    text_spec,
)
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


Reader = Literal["language", "projector"]
"""Which part reads the text of a stage: the language model, or a projector that is trained by pictures and texts."""


def read_facts(config: ModelConfig, max_length: int, reader: Reader = "language") -> Facts:
    """Tokenizer, image and text specs of the model that `config` describes, the text as its `reader` reads it."""
    _check_tiles(config)
    image = with_projector(image_spec(config.vision, config.image), config.projector)
    if reader == "projector":
        if not isinstance(config.projector, QFormerProjector):
            raise InputError(
                f"model.projector.kind: {config.projector.kind} reads no text; this objective needs qformer"
            )
        path, beside = config.projector.path, config.projector.num_queries
        tokenizer = load_encoder_tokenizer(path)
        return Facts(tokenizer, image, text_spec(path, tokenizer, max_length, num_beside=beside))
    tokenizer = load_tokenizer(config.language)
    if isinstance(config.language, DecoderLanguage):
        return Facts(tokenizer, image, decoder_text_spec(config.language, tokenizer, max_length))
    return Facts(tokenizer, image, text_spec(config.language.path, tokenizer, max_length))


def with_projector(image: ImageSpec, projector: ProjectorConfig) -> ImageSpec:
    """The spec with the number of tokens that the projector makes of a square, where it is not one a feature."""
    num_tokens = projector.num_tokens(image.num_features)
    return image if num_tokens == image.num_features else image.model_copy(update={"num_projected_tokens": num_tokens})


def _check_tiles(config: ModelConfig) -> None:
    """AnyRes puts tiles together patch by patch, so each patch must have one feature, and nothing else."""
    if not isinstance(config.image, AnyResImage):
        return
    if config.vision.keep_cls:
        raise InputError("model.vision.keep_cls: true, but anyres puts patches together; leave it out, or crop or pad")
    if not isinstance(config.projector, LinearProjector | MlpProjector):
        raise InputError(f"model.image.kind: anyres needs a feature for each patch, {config.projector.kind} has others")


def build_vlm(config: ModelConfig, facts: Facts, *, frozen_dtype: torch.dtype, seed: int) -> VLM:
    """The whole model with pretrained parts in `frozen_dtype`; what is new is drawn from `seed`, in fp32."""
    vision = load_vision(config.vision, frozen_dtype)
    language = load_language(config.language, frozen_dtype) if isinstance(config.language, PretrainedLanguage) else None
    new = new_parts(config, facts, vision.width, language.config if language is not None else None, seed=seed)
    return VLM(vision, new.projector, language or new.decoder, image=facts.image, text=facts.text, future=new.future)


@dataclass(frozen=True)
class NewParts:
    """What no pretrained base holds: every checkpoint must."""

    projector: nn.Module
    future: nn.Module | None
    decoder: Any | None


def new_parts(config: ModelConfig, facts: Facts, vision_width: int, language: Any, *, seed: int) -> NewParts:
    """The new parts in fp32; `language` is the pretrained language model's configuration, None where it is new too.

    The same seed gives the same weights on every rank; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = None
        if isinstance(config.language, DecoderLanguage):
            language = decoder_shape(config.language, facts.tokenizer)
        width = int(language.hidden_size)
        projector = with_newline(build_projector(config.projector, vision_width, width), config.image, width)
        future = build_future(config.future, language) if config.future is not None else None
        if isinstance(config.language, DecoderLanguage):
            decoder = build_decoder(language)
    return NewParts(projector, future, decoder)


def new_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """How the names of the new parts' weights begin."""
    return ("projector.", "future.", *(("language.",) if isinstance(config.language, DecoderLanguage) else ()))
