"""Vision encoders that transformers loads: CLIP's, SigLIP's, DINOv2 and 3, ViT, InternViT. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, check_weights, digest_of, directory_of, read_part
from models.encoders.base import CLIP, EncoderConfig, VisionClass
from models.loading import load_whole
from models.spec import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    import torch

VISION_CLASSES: dict[str, VisionClass] = {
    "clip": CLIP,
    "siglip": VisionClass("SiglipVisionModel", num_leading_tokens=0, has_inner_model=True),
    "dinov2": VisionClass("Dinov2Model", num_leading_tokens=1, has_inner_model=False),
    "vit": VisionClass("ViTModel", num_leading_tokens=1, has_inner_model=False),
    "dinov3": VisionClass("DINOv3ViTModel", 1, has_inner_model=False, only_in_memory="model."),
    "internvit": VisionClass("InternVLVisionModel", num_leading_tokens=1, has_inner_model=False),
}
"""Registers, of which the configuration says how many there are, come to the leading tokens.

SigLIP 2 of a fixed size has SigLIP's class.
"""

WITH_REGISTERS = ("dinov3",)

PREPROCESSOR = "preprocessor_config.json"

UNUSED_WEIGHTS = ("mask_token", "pooler.")
"""Weights that features do not depend on, which some repositories leave out: transformers draws them at random."""


class TransformersVision(EncoderConfig):
    """A vision encoder that `transformers` loads from `path` (a local directory or a hub name).

    The features are the hidden states after layer `feature_layer` (-1: the last, -2: the one before, as LLaVA takes
    them), without the CLS token unless `keep_cls`. `image_size` is the side of its pictures in pixels, with which
    config.json must agree; None: what config.json says.
    """

    kind: Literal["clip", "siglip", "dinov2", "vit", "dinov3", "internvit"]
    path: str
    feature_layer: int = -2
    keep_cls: bool = False
    image_size: PositiveInt | None = None

    @property
    def vision_class(self) -> VisionClass:
        """The entry of its kind in the table above, with the registers that its config.json says."""
        known = VISION_CLASSES[self.kind]
        return with_registers(known, self.vision_facts()) if self.kind in WITH_REGISTERS else known

    def facts(self, find: FindPart = read_part) -> PartFacts:
        """The config.json and directory of `path`, downloaded if necessary."""
        return find(self.path)

    def check_weights(self, find: FindPart = read_part) -> None:
        """Raise InputError where the directory of `path` is here without weights."""
        check_weights(self.facts(find))

    def vision_facts(self, find: FindPart = read_part) -> Any:
        """See `EncoderConfig.vision_facts`; raises InputError where `image_size` is not what config.json says."""
        facts = with_sides(super().vision_facts(find))
        said = facts.get("image_size")
        if self.image_size is not None and said is not None and self.image_size != int(said):
            raise InputError(
                f"model.vision.image_size: {self.image_size}, but {self.path}/config.json says {said}; make a directory"
                f" for that size: sightline convert {self.path} OUT --image-size {self.image_size}"
            )
        return facts

    def size_doubt(self, find: FindPart = read_part) -> str | None:
        """Where config.json and preprocessor_config.json say two sizes, as DINOv2's do, and the recipe says none."""
        directory = self.facts(find).directory
        said = self.vision_facts(find).get("image_size")
        if self.image_size is not None or said is None or directory is None or not (directory / PREPROCESSOR).is_file():
            return None
        processed = processor_size(read_json(directory, PREPROCESSOR))
        if processed is None or processed == int(said):
            return None
        return (
            f"model.vision.image_size: {directory}/config.json says {said} pixels, {PREPROCESSOR} says {processed};"
            f" pictures will have {said}: say so if that is meant (image_size: {said}), or make a directory for the"
            f" other: sightline convert {self.path} OUT --image-size {processed}"
        )

    def normalisation(self) -> tuple[Any, Any]:
        """The values in its preprocessor_config.json; CLIP's where it has none."""
        preprocessing = read_json(directory_of(self.path), PREPROCESSOR)
        return preprocessing.get("image_mean", CLIP_MEAN), preprocessing.get("image_std", CLIP_STD)

    def weights_digest(self) -> str:
        """The sha256 of the weights and config.json at `path`."""
        return digest_of(directory_of(self.path))

    def load_model(self, dtype: torch.dtype) -> Any:
        """Load with transformers' own class, in `dtype`."""
        import transformers

        model_class: Any = getattr(transformers, self.vision_class.class_name)
        return load_whole(
            model_class.from_pretrained,
            directory_of(self.path),
            may_lack=UNUSED_WEIGHTS,
            advice="fetch or copy it again",
            dtype=dtype,
            trust_remote_code=False,
        )


def with_registers(known: VisionClass, facts: Mapping[str, Any]) -> VisionClass:
    """A vision class whose leading tokens count the configuration's registers (Darcet et al. 2024)."""
    return known._replace(num_leading_tokens=known.num_leading_tokens + int(facts.get("num_register_tokens") or 0))


def with_sides(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A vision configuration in which a square's size is one number, where its file has two equal ones."""
    sides = {name: facts[name] for name in ("image_size", "patch_size") if isinstance(facts.get(name), list | tuple)}
    return {**facts, **{name: int(side[0]) for name, side in sides.items() if len(set(side)) == 1}}


def processor_size(preprocessing: Mapping[str, Any]) -> int | None:
    """The side in pixels of the squares that a preprocessor_config.json makes; None where it makes or says none."""
    crops = preprocessing.get("do_center_crop", "crop_size" in preprocessing)
    size = preprocessing.get("crop_size" if crops else "size")
    if not isinstance(size, Mapping):
        return size if isinstance(size, int) else None
    height, width = size.get("height"), size.get("width")
    return height if isinstance(height, int) and height == width else None
