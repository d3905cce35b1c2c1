"""The tower of a published VLM as a vision encoder. Loads without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, check_weights, digest_of, directory_of, read_part
from models.encoders.base import EncoderConfig, VisionClass
from models.encoders.pretrained import UNUSED_WEIGHTS, VISION_CLASSES, with_registers, with_sides
from models.published.family import read_published
from models.published.image import channel_statistics, open_published_processor

if TYPE_CHECKING:
    import torch

TOWERS = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
    "vit": "vit",
    "dinov3_vit": "dinov3",
    "internvl_vision": "internvit",
}
"""`model_type` of a tower's configuration -> the encoder's kind."""


class PublishedVision(EncoderConfig):
    """The tower of the VLM at `path`, with the features of `feature_layer`; see `EncoderConfig`."""

    kind: Literal["published"] = "published"
    path: str
    feature_layer: int = -2
    keep_cls: bool = False

    @property
    def vision_class(self) -> VisionClass:
        """The class of its tower. Raises InputError where that is not known here."""
        return self.class_of(read_part)

    def class_of(self, find: FindPart) -> VisionClass:
        """The same; `find` gives the config.json."""
        facts = read_published(self.path, find)
        kind = str(facts.config.vision_config.model_type)
        if kind not in TOWERS:
            raise InputError(
                f"{facts.source}: its tower is {kind}, which is not known here; known are {', '.join(TOWERS)}"
            )
        return with_registers(VISION_CLASSES[TOWERS[kind]], facts.config.vision_config.to_dict())

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """The tower's part of config.json, completed by transformers' defaults."""
        found = read_published(self.path, find)
        return PartFacts(with_sides(found.config.vision_config.to_dict()), found.source, found.directory)

    def check_weights(self, find: FindPart = read_part) -> None:
        """Raise InputError where the directory of `path` is here without weights."""
        check_weights(self.facts(find))

    def normalisation(self) -> tuple[Any, Any]:
        """The values of the VLM's own processor."""
        return channel_statistics(open_published_processor(read_published(self.path)))

    def weights_digest(self) -> str:
        """The sha256 of the weights and config.json at `path`."""
        return digest_of(directory_of(self.path))

    def load_model(self, dtype: torch.dtype) -> Any:
        """Its class with the tower's weights, in `dtype`."""
        import transformers

        from models.loading import load_from_tensors
        from models.published.weights import tensors_of_part

        directory = directory_of(self.path)
        return load_from_tensors(
            getattr(transformers, self.vision_class.class_name),
            read_published(self.path).config.vision_config,
            tensors_of_part(directory, "vision"),
            directory,
            may_lack=(*UNUSED_WEIGHTS, "head."),
            dtype=dtype,
        )
