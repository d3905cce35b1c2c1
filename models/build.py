"""From the model part of a recipe to a model: specs first (no weights), then the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.anyres import with_newline
from models.common.errors import InputError
from models.common.pickled import open_weights
from models.common.tensors import Tensors
from models.common.torchvision import check_torchvision
from models.config import ModelSource, Reader
from models.decoder import is_known
from models.languages.base import LanguageConfig
from models.languages.text import load_encoder_tokenizer, text_spec
from models.packing_probe import check_packing
from models.placement import divide_all, gathering
from models.projectors.base import ProjectorConfig, new_projector
from models.spec import ImageSpec, TextSpec
from models.vlm import VLM


@dataclass(frozen=True)
class ModelMetadata:
    """What the data pipeline needs to know of a model: cheap to read, no weights are loaded."""

    tokenizer: Any
    image: ImageSpec
    text: TextSpec


def read_metadata(config: ModelSource, max_length: int, reader: Reader = "language") -> ModelMetadata:
    """Tokenizer, image and text specs of the model that `config` describes; `reader` decides which part reads the text.

    Raises InputError where the parts do not fit together, or rows of `max_length` tokens do not fit the reader.
    """
    check_torchvision()
    spec = config.vision.image_spec(config.image)
    check_tiles(config, spec.size)
    image = with_projector(spec, config.projector)
    if reader == "projector":
        encoder = config.projector.text_encoder
        if encoder is None:
            raise InputError(
                f"model.projector.kind: {config.projector.kind} reads no text; this objective needs qformer"
            )
        tokenizer = load_encoder_tokenizer(encoder.path)
        text = text_spec(encoder.path, tokenizer, max_length, num_beside=encoder.num_beside)
        return ModelMetadata(tokenizer, image, text)
    tokenizer = config.language.load_tokenizer()
    return ModelMetadata(tokenizer, image, config.language.text_spec(tokenizer, max_length))


def with_projector(image: ImageSpec, projector: ProjectorConfig) -> ImageSpec:
    """The spec with the projector's number of tokens per square, where that is not one per feature."""
    num_tokens = projector.num_tokens(image.num_features)
    return image if num_tokens == image.num_features else image.model_copy(update={"num_projected_tokens": num_tokens})


def check_tiles(config: ModelSource, size: int) -> None:
    """AnyRes puts tiles of `size` pixels together patch by patch, each of which must have one feature and no other.

    Raises:
        InputError: the encoder or the projector gives others, or a pinpoint is no multiple of a tile.
    """
    if not config.image.is_tiled:
        return
    if config.vision.keep_cls:
        raise InputError("model.vision.keep_cls: true, but anyres puts patches together; leave it out, or crop or pad")
    if not config.projector.keeps_patches:
        raise InputError(f"model.image.kind: anyres needs a feature for each patch, {config.projector.kind} has others")
    wrong = [pinpoint for pinpoint in getattr(config.image, "pinpoints", ()) if any(side % size for side in pinpoint)]
    if wrong:
        raise InputError(f"model.image.pinpoints: {list(wrong[0])} is not a multiple of the encoder's square of {size}")


def build_vlm(config: ModelSource, facts: ModelMetadata, *, frozen_dtype: torch.dtype, seed: int) -> VLM:
    """The whole model: pretrained parts in `frozen_dtype`, new parts in fp32, initialized from `seed`.

    Pretrained weights are where `models.placement.placing` says, new ones on the host.
    """
    vision = config.vision.load(frozen_dtype)
    divide_all(vision)
    language = config.language.load_model(frozen_dtype)
    if language is not None:
        divide_all(language)
        if not is_known(language):
            with gathering(language):
                check_packing(language)
            check_names(language, config.language)
    new = new_parts(config, facts, vision.width, language.config if language is not None else None, seed=seed)
    return VLM(vision, new.projector, language or new.decoder, image=facts.image, text=facts.text, mtp=new.mtp)


def check_names(language: Any, config: LanguageConfig) -> None:
    """Raise InputError where a merge could not write what is learnt, by the names of the weights.

    transformers joins some classes' matrices when it loads them, those of experts for one; and Llava looks for a
    language model's weights below `model.`.
    """
    foreign = [name for name, _ in language.named_parameters() if not name.startswith(("model.", "lm_head."))]
    if foreign:
        raise InputError(
            f"{config.weights_directory()}: {type(language).__name__} names a weight {foreign[0]}, which no bundle"
            " can hold; take a language model whose weights are below `model.`"
        )
    tensors = open_tensors(config)
    if tensors is None:
        return
    is_tied = bool(getattr(language.config, "tie_word_embeddings", False))
    names = [name for name, _ in language.named_parameters() if not (is_tied and name == "lm_head.weight")]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            f"{config.weights_directory()}: {type(language).__name__} has {missing[0]} in memory and no such tensor in"
            " its files, so what it learns could not be merged; take a language model whose matrices are not joined"
        )


def open_tensors(config: LanguageConfig) -> Tensors | None:
    """A pretrained language model's weights, by their names in its class; None of a new one."""
    directory = config.weights_directory()
    return None if directory is None else config.tensors() or open_weights(directory)


@dataclass(frozen=True)
class NewParts:
    """The parts without pretrained weights, which every checkpoint must therefore hold."""

    projector: nn.Module
    mtp: nn.Module | None
    decoder: Any | None


def new_parts(config: ModelSource, facts: ModelMetadata, vision_width: int, language: Any, *, seed: int) -> NewParts:
    """The new parts in fp32; `language` is the pretrained language model's configuration, None where it is also new.

    The same seed gives the same weights on every rank; torch's global generator is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.language.is_new:
            language = config.language.transformers_config(facts.tokenizer)
        width = int(language.hidden_size)
        # What is drawn first decides the weights of all that follows: projector, newline, heads, decoder.
        projector = with_newline(new_projector(config.projector, vision_width, width), config.image, width)
        mtp = None
        if config.future is not None:
            from models.mtp.heads import build_heads

            mtp = build_heads(config.future, language)
        config.fill(projector, mtp)
        decoder = config.language.draw(language)
    return NewParts(projector, mtp, decoder)


def new_prefixes(config: ModelSource) -> tuple[str, ...]:
    """The prefixes of the new parts' weight names."""
    return ("projector.", "future.", *(("language.",) if config.language.is_new else ()))
