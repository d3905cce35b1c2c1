"""Projectors: from the vision encoder's features to what the language model reads.

    features_TPV -> projected_TID

T tiles, P features a tile, V the encoder's width, I image tokens a tile (P, or fewer), D the language model's width.
How many tokens a projector makes of a tile its configuration says (`num_tokens`), which the data pipeline goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from models.config import ProjectorConfig, QFormerProjector
from models.projectors.perceiver import Perceiver
from models.projectors.pixel_shuffle import PixelShuffle
from models.projectors.qformer import QFormer
from models.projectors.simple import Linear, Mlp
from models.source import directory_of, read_json

PROJECTORS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "mlp": Mlp,
    "qformer": QFormer,
    "perceiver": Perceiver,
    "pixel_shuffle": PixelShuffle,
}


def build_projector(
    config: ProjectorConfig, vision_width: int, language_width: int, *, text_facts: Mapping[str, Any] | None = None
) -> nn.Module:
    """The projector that `config` names; new weights come from torch's global generator.

    A Q-Former starts from the text encoder at its path. With `text_facts`, that encoder's config.json, only its shapes
    are taken and nothing is read.
    """
    if not isinstance(config, QFormerProjector):
        return PROJECTORS[config.kind](config, vision_width, language_width)
    directory = None if text_facts is not None else directory_of(config.path)
    facts = text_facts if directory is None else read_json(directory, "config.json")
    assert facts is not None
    qformer = QFormer(config, vision_width, language_width, facts)
    if directory is not None:
        qformer.start_from(directory)
    return qformer
