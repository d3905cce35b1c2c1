"""Facts that both the data pipeline and the model rely on. Loads without torch.

Owns: the base class of every configuration value, what a picture becomes (`ImageSpec`), what a text becomes
(`TextSpec`), and the one function that says how many image tokens a picture costs. Does not own pixels or weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

IMAGE_TOKEN = "<image>"
"""The placeholder in text, as in LLaVA's format; one real row of the exported vocabulary."""

IGNORE_INDEX = -100
"""The label of a position that carries no target (PyTorch's own convention)."""


class Config(BaseModel):
    """Base of all configuration values: frozen, and an unknown or mistyped key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CropImage(Config):
    """Resize the shorter side to `size`, then cut the central square (CLIP's own preprocessing)."""

    kind: Literal["crop"] = "crop"


class PadImage(Config):
    """Pad to a square with the encoder's mean colour (`mean`) or black, then resize to `size` (LLaVA-1.5's `pad`)."""

    kind: Literal["pad"] = "pad"
    colour: Literal["mean", "black"] = "mean"


ImageFit = Annotated[CropImage | PadImage, Field(discriminator="kind")]


class ImageSpec(Config):
    """What the vision encoder takes: `size` x `size` pixels, and how many tokens come out of one such square.

    `mean` and `std` are per channel, for pixel values scaled to [0, 1].
    """

    size: int
    patch_size: int
    fit: ImageFit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_extra_tokens: int = 0
    """Tokens beside the patches, such as a CLS token that is kept."""


class TextSpec(Config):
    """What the language model takes: its longest row, and the ids that a picture and padding stand for."""

    max_length: int
    image_token_id: int
    pad_token_id: int
    vocab_size: int
    """Rows of the language model's embedding, before the image token is added."""


def num_image_tokens(spec: ImageSpec, width: int, height: int) -> int:
    """How many tokens a picture of `width` x `height` pixels costs. Tokenizer, packer and model all ask here."""
    del width, height  # a square is a square; AnyRes will look at them
    return (spec.size // spec.patch_size) ** 2 + spec.num_extra_tokens
