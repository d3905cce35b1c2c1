"""The shapes of a model's matrices, from configuration alone: what FLOPs and memory are counted by. No weight is read.

Owns what a config.json says of each part. Does not own what the shapes cost (`trainer.flops`, `tools.preflight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.config import (
    DecoderLanguage,
    FutureConfig,
    LanguageConfig,
    LinearProjector,
    ModelConfig,
    OpenClipVision,
    ParallelFuture,
    PerceiverProjector,
    PixelShuffleProjector,
    ProjectorConfig,
    QFormerProjector,
    VisionConfig,
)
from models.errors import InputError
from models.language import decoder_facts
from models.source import directory_of, read_json
from models.spec import AnyResImage
from models.vision_open_clip import clip_shape

LEADING_TOKENS = {"open_clip": 1, "clip": 1, "siglip": 0, "dinov2": 1, "vit": 1}


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer up to the layer whose hidden states are the features; layers after it are not needed."""

    width: int
    inner: int
    num_layers: int
    """Layers that a forward needs."""
    num_patches: int
    num_leading_tokens: int
    patch_inputs: int
    """Values of a patch: 3 x side x side."""

    @property
    def num_tokens(self) -> int:
        """Positions in a tile's attention."""
        return self.num_patches + self.num_leading_tokens

    @property
    def layer_weights(self) -> int:
        """Matrix elements that a token meets in one layer: q, k, v, o and the two of the MLP."""
        return 4 * self.width**2 + 2 * self.width * self.inner


@dataclass(frozen=True)
class Linear:
    """A matrix that every row of its part passes: (inputs, outputs), and its name in LoRA's `targets`."""

    name: str
    inputs: int
    outputs: int
    per_token: float = 1.0
    """Rows that pass it for each image token, of a projector that makes fewer tokens than it gets features."""

    @property
    def weights(self) -> int:
        """Elements."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ProjectorShape:
    """Matrices of a projector, in order; attention itself is left out, which with few queries is little beside them."""

    linears: tuple[Linear, ...]

    @property
    def weights(self) -> float:
        """Matrix elements that rows meet for one image token."""
        return sum(linear.weights * linear.per_token for linear in self.linears)


@dataclass(frozen=True)
class LanguageShape:
    """A decoder: the linears of one layer, how many layers, and its head over the vocabulary."""

    width: int
    inner: int
    num_layers: int
    num_heads: int
    query_width: int
    """All query heads side by side."""
    key_width: int
    vocabulary: int
    layer_linears: tuple[Linear, ...]
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Matrix elements that a token meets in one layer."""
        return sum(linear.weights for linear in self.layer_linears)


@dataclass(frozen=True)
class PairShape:
    """A Q-Former that reads pictures and their texts."""

    width: int
    inner: int
    num_layers: int
    num_cross: int
    """Layers whose queries look at the picture."""
    num_queries: int
    num_features: int
    vision_width: int
    joint_width: int
    """In which pictures and texts are compared."""
    vocabulary: int


@dataclass(frozen=True)
class ModelShape:
    """The three parts; a tile gives `features_per_tile` image tokens."""

    vision: VisionShape
    projector: ProjectorShape
    language: LanguageShape
    features_per_tile: int
    future: LanguageShape | None = None
    """Heads for further tokens: a layer each, behind the language model's last."""
    pairs: PairShape | None = None
    """A Q-Former's, of a stage without the language model."""


def read_shape(model: ModelConfig) -> ModelShape:
    """`model_shape` with each part's config.json read from where its weights lie."""
    text = None
    if isinstance(model.projector, QFormerProjector):
        text = read_json(directory_of(model.projector.path), "config.json")
    return model_shape(model, _vision_facts(model.vision), _language_facts(model.language), text)


def _vision_facts(config: VisionConfig) -> dict[str, Any]:
    if isinstance(config, OpenClipVision):
        return clip_shape(config)
    return read_json(directory_of(config.path), "config.json")


def _language_facts(config: LanguageConfig) -> dict[str, Any]:
    directory = directory_of(config.tokenizer_path)
    facts = read_json(directory, "config.json")
    return decoder_facts(config, int(facts["vocab_size"])) if isinstance(config, DecoderLanguage) else facts


def model_shape(
    model: ModelConfig, vision: Mapping[str, Any], language: Mapping[str, Any], text: Mapping[str, Any] | None = None
) -> ModelShape:
    """The shapes of `model`; `vision` and `language` are the two parts' config.json, `text` a Q-Former's.

    Raises:
        InputError: a part whose shapes are not known here, or a config.json that lacks a field.
    """
    try:
        seen = vision_shape(model, vision)
        spoken = language_shape(language)
    except KeyError as error:
        raise InputError(f"a config.json lacks {error.args[0]!r}: is it that of a model of this kind?") from None
    features = seen.num_patches + (seen.num_leading_tokens if model.vision.keep_cls else 0)
    projector = projector_shape(model.projector, seen.width, spoken.width, features, text)
    return ModelShape(
        seen,
        projector,
        spoken,
        model.projector.num_tokens(features),
        None if model.future is None else future_shape(model.future, spoken),
        _pair_shape(model.projector, seen.width, features, text),
    )


def vision_shape(model: ModelConfig, facts: Mapping[str, Any]) -> VisionShape:
    """Of a config.json, or the `vision_config` in it."""
    facts = facts.get("vision_config", facts)
    width = int(facts["hidden_size"])
    total = int(facts["num_hidden_layers"])
    layer = model.vision.feature_layer
    needed = layer if layer >= 0 else total + 1 + layer
    patches = (int(facts["image_size"]) // int(facts["patch_size"])) ** 2
    leading = LEADING_TOKENS.get(model.vision.kind, 1)
    inner = int(facts.get("intermediate_size") or width * int(facts.get("mlp_ratio", 4)))
    return VisionShape(width, inner, needed, patches, leading, 3 * int(facts["patch_size"]) ** 2)


def projector_shape(
    config: ProjectorConfig,
    vision_width: int,
    language_width: int,
    num_features: int,
    text: Mapping[str, Any] | None = None,
) -> ProjectorShape:
    """The matrices of a projector that gets `num_features` of a tile."""
    first, second = Linear("linear_1", vision_width, language_width), Linear("linear_2", language_width, language_width)
    features = num_features / config.num_tokens(num_features)
    if isinstance(config, LinearProjector):
        return ProjectorShape((first,))
    if isinstance(config, PixelShuffleProjector):
        return ProjectorShape((Linear("linear_1", config.factor**2 * vision_width, language_width), second))
    if isinstance(config, PerceiverProjector):
        layer = (
            *_attention(vision_width, vision_width, 1 + features),
            Linear("up", vision_width, 4 * vision_width),
            Linear("down", 4 * vision_width, vision_width),
        )
        return ProjectorShape((*layer * config.num_layers, Linear("output", vision_width, language_width)))
    if isinstance(config, QFormerProjector):
        assert text is not None, "a Q-Former's shape is its text encoder's"
        return _qformer(config, vision_width, language_width, features, text)
    return ProjectorShape((first, second))


def _qformer(
    config: QFormerProjector, vision_width: int, language_width: int, features: float, text: Mapping[str, Any]
) -> ProjectorShape:
    """Its way from a picture to image tokens; the text side is not on it."""
    width, inner = int(text["dim"]), int(text["hidden_dim"])
    linears: list[Linear] = []
    for number in range(int(text["n_layers"])):
        linears += _attention(width, width, 1.0)
        if number % config.cross_attention_every == 0:
            linears += _attention(width, vision_width, features)
        linears += [Linear("up", width, inner), Linear("down", inner, width)]
    adapter = (Linear("linear_1", width, language_width), Linear("linear_2", language_width, language_width))
    return ProjectorShape((*linears, *adapter))


def _attention(width: int, source_width: int, sources: float) -> tuple[Linear, ...]:
    """`sources` positions are looked at for each that looks."""
    keys = tuple(Linear(name, source_width, width, sources) for name in ("key", "value"))
    return (*keys, Linear("query", width, width), Linear("output", width, width))


def language_shape(facts: Mapping[str, Any]) -> LanguageShape:
    """Of a Llama-like config.json (gated MLP, grouped keys), as our own decoder's is."""
    width, inner, heads = int(facts["hidden_size"]), int(facts["intermediate_size"]), int(facts["num_attention_heads"])
    head = int(facts.get("head_dim") or width // heads)
    query, key = heads * head, int(facts.get("num_key_value_heads") or heads) * head
    linears = (
        Linear("q_proj", width, query),
        Linear("k_proj", width, key),
        Linear("v_proj", width, key),
        Linear("o_proj", query, width),
        Linear("gate_proj", width, inner),
        Linear("up_proj", width, inner),
        Linear("down_proj", inner, width),
    )
    tied = bool(facts.get("tie_word_embeddings", False))
    return LanguageShape(
        width, inner, int(facts["num_hidden_layers"]), heads, query, key, int(facts["vocab_size"]), linears, tied
    )


def future_shape(config: FutureConfig, language: LanguageShape) -> LanguageShape:
    """The layers of the heads, as wide as the language model's; one that is told the next token joins it first."""
    facts = {
        "hidden_size": language.width,
        "intermediate_size": language.inner,
        "num_attention_heads": language.num_heads,
        "num_hidden_layers": config.num_tokens - 1 if isinstance(config, ParallelFuture) else 1,
        "vocab_size": language.vocabulary,
        "tie_word_embeddings": True,
    }
    shape = language_shape(facts)
    if isinstance(config, ParallelFuture):
        return shape
    join = Linear("join", 2 * language.width, language.width)
    return replace(shape, layer_linears=(join, *shape.layer_linears))


def _pair_shape(
    config: ProjectorConfig, vision_width: int, num_features: int, text: Mapping[str, Any] | None
) -> PairShape | None:
    if not isinstance(config, QFormerProjector) or text is None:
        return None
    num_layers = int(text["n_layers"])
    return PairShape(
        width=int(text["dim"]),
        inner=int(text["hidden_dim"]),
        num_layers=num_layers,
        num_cross=-(-num_layers // config.cross_attention_every),
        num_queries=config.num_queries,
        num_features=num_features,
        vision_width=vision_width,
        joint_width=config.joint_width,
        vocabulary=int(text["vocab_size"]),
    )


def tiles_of(model: ModelConfig, size: int) -> int:
    """Most tiles that one picture can become."""
    if not isinstance(model.image, AnyResImage):
        return 1
    return 1 + max(down * across // size**2 for down, across in model.image.pinpoints)
