"""The model part of a recipe: one tagged union for each seam. Loads without torch.

Owns which parts exist and their few values. The classes that they build stand in `models.vision`, `models.projectors`
and `models.language`, each in an explicit table with the same keys as here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
    """An encoder of open_clip: `architecture` as open_clip names it, `weights` a tag or a file."""

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


class MlpProjector(Config):
    """Linear, GELU, Linear, as in LLaVA-1.5; the hidden width is the language model's."""

    kind: Literal["mlp"] = "mlp"


class QFormerProjector(Config):
    """Learnt queries that read the picture through cross-attention, then an MLP to the language model's width."""

    kind: Literal["qformer"] = "qformer"
    path: str
    """The text encoder whose layers it starts from (DistilBERT)."""
    num_queries: int = 32
    cross_attention_every: int = 1
    adapter: MlpProjector = MlpProjector()


ProjectorConfig = Annotated[LinearProjector | MlpProjector | QFormerProjector, Field(discriminator="kind")]


class PretrainedLanguage(Config):
    """A causal language model that `transformers` loads from `path` (a local directory or a hub name).

    `load` says how its frozen weights lie in memory: `nf4` and `int8` by bitsandbytes, to train a 7B on a small GPU.
    """

    kind: Literal["pretrained"] = "pretrained"
    path: str
    load: Literal["full", "nf4", "int8"] = "full"


class DecoderLanguage(Config):
    """A decoder trained from scratch: sinusoidal positions, pre-norm blocks, a vocabulary from `tokenizer`."""

    kind: Literal["decoder"] = "decoder"
    tokenizer: str
    num_layers: int = 24
    num_heads: int = 8
    width: int = 512
    num_future_tokens: int = 1


LanguageConfig = Annotated[PretrainedLanguage | DecoderLanguage, Field(discriminator="kind")]


class ModelConfig(Config):
    """Vision encoder -> projector -> language model, and how a picture is fitted to the encoder's square."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    image: ImageFit = PadImage()
