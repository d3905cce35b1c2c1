"""The projector of a published VLM: LLaVA's two layers, or one of ours in our own bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.common.source import FindPart, read_part
from models.projectors.base import PROJECTORS, ProjectorConfig
from models.published.family import read_published

if TYPE_CHECKING:
    from torch import nn


class PublishedProjector(ProjectorConfig):
    """The projector of the VLM at `path`, as its config.json describes it. Its weights come with the whole model."""

    kind: Literal["published"] = "published"
    path: str
    keeps_patches: ClassVar[bool] = True

    def _own(self, find: FindPart = read_part) -> tuple[Any, ProjectorConfig | None]:
        """The VLM's configuration, and that of a projector that is not stock LLaVA's."""
        config = read_published(self.path, find).config
        values = getattr(config, "projector", None)
        if values is None:
            return config, None
        return config, PROJECTORS.decode(values, (config.packages or {}).get(PROJECTORS.group))

    def num_tokens(self, num_features: int) -> int:
        """See `ProjectorConfig.num_tokens`."""
        _, own = self._own()
        return num_features if own is None else own.num_tokens(num_features)

    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """See `ProjectorConfig.build`."""
        from models.projectors.mlp import Mlp

        config, own = self._own(find)
        if own is not None:
            return own.build_exported(vision_width, language_width, config)
        bias = bool(getattr(config, "multimodal_projector_bias", True))
        return Mlp(vision_width, language_width, activation=config.projector_hidden_act, bias=bias)
