"""The model part of a recipe: one tagged union for each seam. Loads without torch.

Owns which parts exist and their few values. The classes that they build stand in `models.vision`, `models.projectors`
and `models.language`, each in an explicit table with the same keys as here.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from models.errors import InputError
from models.spec import Config, ImageFit, PadImage


class TransformersVision(Config):
    """A vision encoder that `transformers` loads from `path` (a local directory or a hub name).

    The features are the hidden states after layer `feature_layer` (-1: the last, -2: the one before, as LLaVA takes
    them), without the CLS token unless `keep_cls`.
    """

    kind: Literal["clip", "siglip", "dinov2", "vit"]
    path: str
    feature_layer: int = -2
    keep_cls: bool = False


class OpenClipVision(Config):
    """A vision transformer of open_clip: `weights` is one of its tags, or a file.

    `architecture` is named as open_clip names it, or a JSON file in its format.
    """

    kind: Literal["open_clip"] = "open_clip"
    architecture: str
    weights: str
    feature_layer: int = -1
    keep_cls: bool = False


VisionConfig = Annotated[TransformersVision | OpenClipVision, Field(discriminator="kind")]


class LinearProjector(Config):
    """One linear layer. `init_gain` asks for Xavier normal weights with that gain instead of PyTorch's own."""

    kind: Literal["linear"] = "linear"
    init_gain: float | None = None

    def num_tokens(self, num_features: int) -> int:
        """Image tokens that it makes of a tile's features; likewise below."""
        return num_features


class MlpProjector(Config):
    """Linear, GELU, Linear, as in LLaVA-1.5; the hidden width is the language model's."""

    kind: Literal["mlp"] = "mlp"

    def num_tokens(self, num_features: int) -> int:
        """One a feature."""
        return num_features


class QFormerProjector(Config):
    """Learnt queries that read the picture through cross-attention, then an MLP to the language model's width.

    Layers 0, n, 2n, ... of the text encoder at `path` have cross-attention, n being `cross_attention_every`: 2 is
    BLIP-2's. Pictures and texts are compared in `joint_width` dimensions.
    """

    kind: Literal["qformer"] = "qformer"
    path: str
    """The text encoder whose layers it starts from (DistilBERT)."""
    num_queries: PositiveInt = 32
    cross_attention_every: PositiveInt = 1
    joint_width: PositiveInt = 256
    adapter: MlpProjector = MlpProjector()

    def num_tokens(self, num_features: int) -> int:
        """One a query."""
        del num_features
        return self.num_queries


class PerceiverProjector(Config):
    """Flamingo's resampler: `num_queries` latents that attend to the features in `num_layers` layers."""

    kind: Literal["perceiver"] = "perceiver"
    num_queries: PositiveInt = 64
    num_layers: PositiveInt = 6
    num_heads: PositiveInt = 8

    def num_tokens(self, num_features: int) -> int:
        """One a latent."""
        del num_features
        return self.num_queries


class PixelShuffleProjector(Config):
    """Squares of `factor` x `factor` neighbouring features become one token each, then an MLP (InternVL)."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: PositiveInt = 2

    def num_tokens(self, num_features: int) -> int:
        """One a square. Raises InputError where the features are no grid of such squares."""
        side = math.isqrt(num_features)
        if side**2 != num_features or side % self.factor:
            raise InputError(
                f"model.projector.factor: {num_features} features are no grid of {self.factor} x {self.factor} squares;"
                " leave keep_cls out, or take another factor"
            )
        return num_features // self.factor**2


ProjectorConfig = Annotated[
    LinearProjector | MlpProjector | QFormerProjector | PerceiverProjector | PixelShuffleProjector,
    Field(discriminator="kind"),
]


class PretrainedLanguage(Config):
    """A causal language model that `transformers` loads from `path` (a local directory or a hub name).

    `load` says how its frozen weights lie in memory: `nf4` and `int8` by bitsandbytes, to train a 7B on a small GPU.
    """

    kind: Literal["pretrained"] = "pretrained"
    path: str
    load: Literal["full", "nf4", "int8"] = "full"

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer lies."""
        return self.path


class DecoderLanguage(Config):
    """A decoder trained from scratch: sinusoidal positions, pre-norm blocks, a vocabulary from `tokenizer`.

    `inner` is the width inside the gated MLP; by default 8/3 of the width, rounded up to a multiple of 32.
    """

    kind: Literal["decoder"] = "decoder"
    tokenizer: str
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 8
    width: PositiveInt = 512
    inner: PositiveInt | None = None
    max_positions: PositiveInt = 2048

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer lies."""
        return self.tokenizer

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> DecoderLanguage:
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} is not a multiple of twice the {self.num_heads} heads")
        return self


LanguageConfig = Annotated[PretrainedLanguage | DecoderLanguage, Field(discriminator="kind")]


class ParallelFuture(Config):
    """A head for each of `num_tokens` future tokens but the next, side by side (Gloeckle et al. 2024)."""

    kind: Literal["parallel"] = "parallel"
    num_tokens: int = Field(default=4, ge=2, le=16)


class SequentialFuture(Config):
    """One module that reads the next token and predicts the one behind it (DeepSeek-V3)."""

    kind: Literal["sequential"] = "sequential"


FutureConfig = Annotated[ParallelFuture | SequentialFuture, Field(discriminator="kind")]


class ModelConfig(Config):
    """Vision encoder -> projector -> language model, and how a picture is fitted to the encoder's square."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    image: ImageFit = PadImage()
    future: FutureConfig | None = None
    """Heads for tokens beyond the next one, for the objective `multi_token` and for speculative decoding."""
