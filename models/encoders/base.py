"""The interface of a vision encoder's configuration, and the table of kinds. Loads without torch.

Every encoder is a vision model of transformers, or is converted to one when it is loaded. A new one is one file and one
line: in ENCODERS, or in another package an entry point of the group `sightline.encoders` (see `models.kinds`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from models.common.documents import understanding
from models.common.errors import InputError
from models.common.source import FindPart, PartFacts, read_part
from models.kinds import KindTable
from models.shapes import VisionShape
from models.spec import Config, ImageFit, ImageSpec

if TYPE_CHECKING:
    import torch

    from models.vision import VisionEncoder


class VisionClass(NamedTuple):
    """A vision model of transformers: its class name, and the facts about tokens and weight names that bundles need."""

    class_name: str
    num_leading_tokens: int
    """Tokens before the patches, such as CLS."""
    has_inner_model: bool
    """Whether checkpoints of the hub's classic layout keep its weights under `vision_model.`."""
    only_in_memory: str = ""
    """What names in memory begin with and those in checkpoints do not."""


CLIP = VisionClass("CLIPVisionModel", num_leading_tokens=1, has_inner_model=True)


class KeepFeatures(Config):
    """A frozen encoder's features on disk, so that a picture that is seen again is not computed again."""

    path: str
    """The directory; encoders, stages, ranks and runs may share it."""
    limit_gb: Annotated[float, Field(gt=0, le=1e9)] = 20.0
    """What all entries may take; once they do, no more are kept."""


class EncoderConfig(Config, ABC):
    """From pixels to the features after layer `feature_layer`, without leading tokens unless `keep_cls`."""

    kind: str
    feature_layer: int
    keep_cls: bool = False
    keep_features: KeepFeatures | None = None

    @property
    @abstractmethod
    def vision_class(self) -> VisionClass:
        """Its class in transformers, its leading tokens and its weights' prefix."""

    @abstractmethod
    def facts(self, find: FindPart = read_part) -> PartFacts:
        """Its config.json, in the format of transformers' class; no weight is read."""

    def check_weights(self, find: FindPart = read_part) -> None:
        """Raise InputError where its pretrained weights are not there, as far as that shows without reading them."""
        del find

    def size_doubt(self, find: FindPart = read_part) -> str | None:
        """A line where it is not certain how large its pictures are to be; None where it is."""
        del find
        return None

    @abstractmethod
    def normalisation(self) -> tuple[Any, Any]:
        """(mean, standard deviation) of each channel for pixel values in [0, 1], as its weights were trained."""

    @abstractmethod
    def load_model(self, dtype: torch.dtype) -> Any:
        """The vision model of transformers with its weights, in `dtype`."""

    @abstractmethod
    def weights_digest(self) -> str | None:
        """The sha256 of its pretrained weights, by which a checkpoint recognises them; None without a file."""

    def vision_facts(self, find: FindPart = read_part) -> Any:
        """The vision encoder's part of its config.json; a CLIP's also has the text encoder's."""
        config = self.facts(find).config
        return config.get("vision_config", config)

    @property
    def num_extra_tokens(self) -> int:
        """Features in addition to those of the patches."""
        return self.vision_class.num_leading_tokens if self.keep_cls else 0

    def load(self, dtype: torch.dtype) -> VisionEncoder:
        """The encoder in `dtype`, in evaluation mode."""
        from models.vision import VisionEncoder

        skipped = self.vision_class.num_leading_tokens - self.num_extra_tokens
        model = self.load_model(dtype).eval()
        return VisionEncoder(model, feature_layer=self.feature_layer, num_skipped_tokens=skipped)

    def without_weights(self, find: FindPart = read_part) -> Any:
        """The vision model of transformers from its configuration alone, weights from torch's global generator."""
        import transformers

        facts = self.vision_facts(find)
        model_class: Any = getattr(transformers, self.vision_class.class_name)
        return model_class(model_class.config_class(**{k: v for k, v in facts.items() if k != "model_type"}))

    def image_spec(self, fit: ImageFit) -> ImageSpec:
        """The encoder's input, read from the JSON files next to its weights."""
        with understanding(self.facts().source, "fetch or copy it again"):
            geometry = self.vision_facts()
            self._check_layer(geometry.get("num_hidden_layers"))
            mean, std = self.normalisation()
            return ImageSpec(
                size=int(geometry["image_size"]),
                patch_size=int(geometry["patch_size"]),
                fit=fit,
                mean=triple(mean),
                std=triple(std),
                num_extra_tokens=self.num_extra_tokens,
            )

    def shape(self, find: FindPart = read_part) -> VisionShape:
        """Widths, layers and patches; raises KeyError where its config.json lacks a field."""
        facts = self.vision_facts(find)
        width, total = int(facts["hidden_size"]), int(facts["num_hidden_layers"])
        self._check_layer(total)
        return VisionShape(
            width=width,
            inner=int(facts.get("intermediate_size") or width * int(facts.get("mlp_ratio", 4))),
            num_layers=self.feature_layer if self.feature_layer >= 0 else total + 1 + self.feature_layer,
            num_patches=(int(facts["image_size"]) // int(facts["patch_size"])) ** 2,
            num_leading_tokens=self.vision_class.num_leading_tokens,
            patch_inputs=3 * int(facts["patch_size"]) ** 2,
            patch_size=int(facts["patch_size"]),
        )

    def _check_layer(self, num_layers: int | None) -> None:
        """Raise InputError where the encoder has no such layer; a config.json that does not say leaves it open."""
        if num_layers is not None and not -num_layers - 1 <= self.feature_layer <= num_layers:
            raise InputError(
                f"model.vision.feature_layer: {self.feature_layer}, but the encoder has {num_layers} layers:"
                f" {-num_layers - 1} (the embedding) to {num_layers}"
            )

    def export_name(self, name: str) -> str:
        """The name in a bundle of a parameter of the vision model, by its name in transformers' class."""
        inner = "vision_model." if self.vision_class.has_inner_model else ""
        return f"vision_tower.{inner}{name.removeprefix(self.vision_class.only_in_memory)}"

    @property
    def num_registers(self) -> int:
        """Leading tokens beside one class token that are no features, which stock Llava would keep."""
        return max(0, self.vision_class.num_leading_tokens - 1) if self.select_strategy == "default" else 0

    @property
    def select_strategy(self) -> str:
        """Llava's `vision_feature_select_strategy`: `default` drops one leading token, `full` drops none."""
        return "default" if self.vision_class.num_leading_tokens and not self.keep_cls else "full"


def triple(values: Any) -> tuple[float, float, float]:
    """One value for each channel."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


ENCODERS = KindTable(
    "sightline.encoders",
    EncoderConfig,  # type: ignore[type-abstract]
    {
        "clip": "models.encoders.pretrained:TransformersVision",
        "siglip": "models.encoders.pretrained:TransformersVision",
        "dinov2": "models.encoders.pretrained:TransformersVision",
        "vit": "models.encoders.pretrained:TransformersVision",
        "dinov3": "models.encoders.pretrained:TransformersVision",
        "internvit": "models.encoders.pretrained:TransformersVision",
        "published": "models.published.vision:PublishedVision",
        "open_clip": "models.encoders.open_clip:OpenClipVision",
    },
)

Encoder = Annotated[EncoderConfig, ENCODERS]
