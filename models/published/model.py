"""A published VLM as the model of a recipe: `model: {kind: published, path: DIR}`. Loads without torch.

DIR --family, processor--> vision | projector | language, image policy, heads for further tokens
a run's weights ---------> DIR's own layout again (`tools.export.write_back`)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.common.errors import InputError
from models.common.source import FindPart, directory_of, read_part
from models.config import ModelSource
from models.encoders.base import EncoderConfig, KeepFeatures
from models.languages.base import FrozenFormat, LanguageConfig
from models.mtp.base import MTP_HEADS, MtpConfig
from models.projectors.base import ProjectorConfig
from models.published.family import read_published
from models.published.image import image_fit, open_published_processor
from models.published.language import PublishedLanguage
from models.published.projector import PublishedProjector
from models.published.vision import PublishedVision
from models.spec import ImageFit

if TYPE_CHECKING:
    from torch import nn


class PublishedModel(ModelSource):
    """All parts of the VLM at `path`, a directory or a hub name: LLaVA's family of transformers, or our own bundle.

    `load` is the format of the frozen language model in memory.
    """

    kind: Literal["published"] = "published"
    path: str
    load: FrozenFormat = "full"
    keep_features: KeepFeatures | None = None

    @property
    def vision(self) -> EncoderConfig:
        """Its tower, up to the layer whose states are the features."""
        return self.vision_of(read_part)

    def vision_of(self, find: FindPart) -> EncoderConfig:
        """The same; `find` gives the config.json."""
        facts = read_published(self.path, find)
        config = facts.config
        tower = PublishedVision(
            path=self.path, feature_layer=int(config.vision_feature_layer), keep_features=self.keep_features
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

    @property
    def projector(self) -> ProjectorConfig:
        """Its projector."""
        return PublishedProjector(path=self.path)

    @property
    def language(self) -> LanguageConfig:
        """Its language model, with tokenizer and chat template."""
        return PublishedLanguage(path=self.path, load=self.load)

    @property
    def image(self) -> ImageFit:
        """What its processor makes of an image."""
        facts = read_published(self.path)
        return image_fit(facts, open_published_processor(facts))

    @property
    def future(self) -> MtpConfig | None:
        """Heads for further tokens, in our own bundles."""
        config: Any = read_published(self.path).config
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
