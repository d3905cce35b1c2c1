"""The interface of a projector's configuration, and the table of kinds. Loads without torch.

A new projector is one file, with its configuration and its module, and one line: in PROJECTORS, or in another package
an entry point of the group `sightline.projectors` (see `models.kinds`). Legend: T tiles, P features a tile, I image
tokens a tile, V the encoder's width, D the language model's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from models.common.source import FindPart, read_part
from models.kinds import KindTable
from models.shapes import Linear, PairShape, ProjectorShape
from models.spec import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


class TextEncoder(NamedTuple):
    """The text encoder whose tokenizer a projector uses, and how many positions of a row need no text position."""

    path: str
    num_beside: int


class ProjectorConfig(Config, ABC):
    """From features [T, P, V] of the vision encoder to image tokens [T, I, D] of the language model."""

    kind: str
    keeps_patches: ClassVar[bool] = False
    """Whether token i of a tile is computed from feature i alone. AnyRes needs this, since it rearranges patches."""
    llava_activation: ClassVar[str | None] = None
    """The `projector_hidden_act` with which stock Llava is this projector; None: a bundle has a class of ours."""

    @property
    def text_encoder(self) -> TextEncoder | None:
        """Set for a projector that also reads text, which can be trained on pairs without the language model."""
        return None

    def num_tokens(self, num_features: int) -> int:
        """I, image tokens of a tile with `num_features` features; raises InputError where they do not fit."""
        return num_features

    @abstractmethod
    def build(self, vision_width: int, language_width: int, find: FindPart = read_part) -> nn.Module:
        """The module [T, P, V] -> [T, I, D]; new weights are drawn from torch's global generator, in fp32.

        `find` gives the shape of a pretrained model whose shape it copies; no weight is read here.
        """

    def load_pretrained(self, projector: nn.Module) -> None:
        """Load pretrained weights into the module that `build` made, for kinds that start from any."""

    def shape(
        self, vision_width: int, language_width: int, num_features: int, find: FindPart = read_part
    ) -> ProjectorShape:
        """The matrices that rows are multiplied with; by default every linear layer, once for each image token."""
        del num_features
        import torch
        from torch import nn

        with torch.device("meta"):
            built = self.build(vision_width, language_width, find)
        linears = [(name, each) for name, each in built.named_modules() if isinstance(each, nn.Linear)]
        return ProjectorShape(tuple(Linear(name, each.in_features, each.out_features) for name, each in linears))

    def pair_shape(self, vision_width: int, num_features: int, find: FindPart = read_part) -> PairShape | None:
        """The shape of training on image-text pairs; None where it does not read text."""
        del vision_width, num_features, find
        return None

    def export_tensors(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The weights that a bundle holds, by their names after `multi_modal_projector.`; by default all of them."""
        yield from weights.items()

    def export_config(self) -> dict[str, Any]:
        """Its entry in the bundle's config.json, from which `build_exported` builds it again."""
        return {"projector": self.model_dump(mode="json")} if self.llava_activation is None else {}

    def build_exported(self, vision_width: int, language_width: int, exported: Any) -> nn.Module:
        """The module for a bundle's weights; `exported` is the configuration read from its config.json."""
        del exported
        return self.build(vision_width, language_width)


PROJECTORS = KindTable(
    "sightline.projectors",
    ProjectorConfig,  # type: ignore[type-abstract]
    {
        "linear": "models.projectors.linear:LinearProjector",
        "mlp": "models.projectors.mlp:MlpProjector",
        "qformer": "models.projectors.qformer:QFormerProjector",
        "perceiver": "models.projectors.perceiver:PerceiverProjector",
        "pixel_shuffle": "models.projectors.pixel_shuffle:PixelShuffleProjector",
    },
)

Projector = Annotated[ProjectorConfig, PROJECTORS]


def new_projector(config: ProjectorConfig, vision_width: int, language_width: int) -> nn.Module:
    """The projector at the start of training: drawn from torch's global generator, then any pretrained weights."""
    projector = config.build(vision_width, language_width)
    config.load_pretrained(projector)
    return projector
