"""A published VLM as the model of a recipe: `model: {kind: published, path: DIR}`. Loads without torch.

DIR --family, processor--> vision | projector | language, image policy, heads for further tokens
a run's weights ---------> DIR's own layout again (`tools.export.write_back`)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import PositiveInt, PrivateAttr, model_validator

from models.common.errors import InputError
from models.common.source import FindPart, directory_of, read_part
from models.config import ModelSource
from models.encoders.base import EncoderConfig, KeepFeatures
from models.languages.base import FrozenFormat, LanguageConfig
from models.mtp.base import MTP_HEADS, MtpConfig
from models.projectors.base import ProjectorConfig
from models.published.family import NATIVE_FAMILIES, PublishedFacts, family_of, read_published
from models.published.image import image_fit, open_published_processor
from models.published.language import PublishedLanguage
from models.published.native import NativeLanguage, NativeProjector, NativeVision, native_fit
from models.published.projector import PublishedProjector
from models.published.vision import PublishedVision
from models.spec import ImageFit

if TYPE_CHECKING:
    from torch import nn


class PublishedModel(ModelSource):
    """All parts of the VLM at `path`, a directory or a hub name: LLaVA's family, Qwen-VL's, or our own bundle.

    `load` is the format of the frozen language model in memory.
    """

    kind: Literal["published"] = "published"
    path: str
    load: FrozenFormat = "full"
    keep_features: KeepFeatures | None = None

    min_image_tokens: PositiveInt | None = None
    """At native resolution, image tokens of the smallest image; None: what its processor says."""
    max_image_tokens: PositiveInt | None = None
    """Of the largest."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> PublishedModel:
        least, most = self.min_image_tokens, self.max_image_tokens
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"min_image_tokens={least} is above max_image_tokens={most}: no image has as many; swap them"
            )
        return self

    _finders: tuple[FindPart] = PrivateAttr(default=(read_part,))  # pydantic would bind a function as a method

    def found_by(self, find: FindPart) -> PublishedModel:
        """See `ModelSource.found_by`."""
        copy = self.model_copy()
        copy._finders = (find,)
        return copy

    @property
    def _facts(self) -> PublishedFacts:
        return read_published(self.path, self._finders[0])

    @property
    def _parts(self) -> Parts:
        return _NATIVE if family_of(self.path, self._finders[0]) in NATIVE_FAMILIES else _SQUARES

    @property
    def vision(self) -> EncoderConfig:
        """Its tower, up to the layer whose states are the features."""
        return self._parts.vision(self, self._finders[0])

    @property
    def projector(self) -> ProjectorConfig:
        """Its projector."""
        return self._parts.projector(path=self.path)

    @property
    def language(self) -> LanguageConfig:
        """Its language model, with tokenizer and chat template."""
        return self._parts.language(path=self.path, load=self.load)

    @property
    def image(self) -> ImageFit:
        """What its processor makes of an image."""
        return self._parts.image(self, self._facts)

    @property
    def future(self) -> MtpConfig | None:
        """Heads for further tokens, in our own bundles."""
        config: Any = self._facts.config
        values = getattr(config, "future", None)
        if values is None:
            return None
        return MTP_HEADS.decode(values, (config.packages or {}).get(MTP_HEADS.group))

    @property
    def layout(self) -> Path:
        """See `ModelSource.layout`."""
        return directory_of(self.path)

    def fill(self, projector: nn.Module, mtp: nn.Module | None) -> None:
        """See `ModelSource.fill`."""
        from models.published.weights import fill

        fill(projector, self.layout, "projector")
        if mtp is not None:
            fill(mtp, self.layout, "future")


def _squares(model: PublishedModel, find: FindPart) -> EncoderConfig:
    """The tower of LLaVA's family."""
    facts = read_published(model.path, find)
    config = facts.config
    tower = PublishedVision(
        path=model.path, feature_layer=int(config.vision_feature_layer), keep_features=model.keep_features
    )
    num_leading = tower.class_of(find).num_leading_tokens
    num_registers = int(getattr(config, "num_register_tokens", None) or 0)
    # LLaVA-NeXT and OneVision put patches together; OneVision's configuration has no word for the strategy.
    strategy = getattr(config, "vision_feature_select_strategy", "full")
    if strategy == "default" and num_leading != 1 + num_registers:
        raise InputError(
            f"{facts.source}: it drops one token of a tower that has {num_leading} before its patches, which is not"
            " trained here"
        )
    return tower.model_copy(update={"keep_cls": strategy == "full" and num_leading > 0})


def _square_fit(model: PublishedModel, facts: PublishedFacts) -> ImageFit:
    if model.min_image_tokens is not None or model.max_image_tokens is not None:
        raise InputError(
            f"model.max_image_tokens: every image of {facts.source} becomes squares of one size; leave it out"
        )
    return image_fit(facts, open_published_processor(facts))


def _patches(model: PublishedModel, find: FindPart) -> EncoderConfig:
    """The tower of a family of native resolution."""
    del find
    return NativeVision(path=model.path, keep_features=model.keep_features)


def _native_fit(model: PublishedModel, facts: PublishedFacts) -> ImageFit:
    return native_fit(facts, model.min_image_tokens, model.max_image_tokens)


class Parts(NamedTuple):
    """What makes the parts of a family."""

    vision: Callable[[PublishedModel, FindPart], EncoderConfig]
    projector: Callable[..., ProjectorConfig]
    language: Callable[..., LanguageConfig]
    image: Callable[[PublishedModel, PublishedFacts], ImageFit]


_SQUARES = Parts(_squares, PublishedProjector, PublishedLanguage, _square_fit)
_NATIVE = Parts(_patches, NativeProjector, NativeLanguage, _native_fit)
