"""The model part of a recipe: where each component comes from, decoded by its `kind`. Loads without torch.

    three directories        -> ModelConfig      (kind parts, the default)
    one published directory  -> PublishedModel   (kind published, in `models.published.model`)

Owns which components there are. Their kinds and interfaces are in `models.encoders.base`,
`models.projectors.base`, `models.languages.base` and `models.mtp.base`; the file of a kind is imported when a recipe
names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from models.common.source import FindPart
from models.encoders.base import Encoder, EncoderConfig
from models.kinds import KindTable
from models.languages.base import Language, LanguageConfig
from models.mtp.base import MtpConfig, MtpHeads
from models.projectors.base import Projector, ProjectorConfig
from models.spec import Config, ImageFit, PadImage

if TYPE_CHECKING:
    from torch import nn

Reader = Literal["language", "projector"]
"""Which part reads the text of a stage: the language model, or a projector that is trained by images and texts."""


class ModelSource(Config):
    """Where a model's parts come from. All that stands behind it (tokens, pixels, packing, checkpoints) is the same."""

    kind: str

    if TYPE_CHECKING:  # fields of one source, properties of another

        @property
        def vision(self) -> EncoderConfig:
            """Pixels to features."""

        @property
        def projector(self) -> ProjectorConfig:
            """Features to image tokens."""

        @property
        def language(self) -> LanguageConfig:
            """Tokens to logits, with the tokenizer."""

        @property
        def image(self) -> ImageFit:
            """How an image becomes the encoder's squares."""

        @property
        def future(self) -> MtpConfig | None:
            """Heads for tokens beyond the next one."""

    def found_by(self, find: FindPart) -> ModelSource:
        """The same source, whose parts read config.json files as `find` gives them."""
        del find  # each part is told when it is asked
        return self

    @property
    def layout(self) -> Path | None:
        """The directory whose layout a merged model goes back into; None: the layout of our own bundles."""
        return None

    def fill(self, projector: nn.Module, mtp: nn.Module | None) -> None:
        """Load the weights that the source has for parts that are otherwise new: projector with newline, and heads."""


class ModelConfig(ModelSource):
    """Vision encoder -> projector -> language model, and how an image is resized to the encoder's square."""

    kind: Literal["parts"] = "parts"
    vision: Encoder
    projector: Projector
    language: Language
    image: ImageFit = PadImage()
    future: MtpHeads | None = None
    """Heads for tokens beyond the next one, for the objective `multi_token` and for speculative decoding."""


SOURCES = KindTable(
    "sightline.models",
    ModelSource,
    {"parts": "models.config:ModelConfig", "published": "models.published.model:PublishedModel"},
)


def _with_kind(values: Any) -> Any:
    return {"kind": "parts", **values} if isinstance(values, Mapping) else values


Model = Annotated[ModelSource, SOURCES, BeforeValidator(_with_kind)]
