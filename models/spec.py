"""Facts that both the data pipeline and the model rely on. Loads without torch.

Owns: the base class of every configuration value, what a picture becomes (`ImageSpec`), what a text becomes
(`TextSpec`), which canvas a picture's tiles are cut from, and the one function that says how many image tokens a
picture costs. Does not own pixels or weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.errors import InputError

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


class AnyResImage(Config):
    """Tiles of a high-resolution picture beside a small whole one (LLaVA-NeXT).

    `pinpoints` are the canvases to choose from, as (height, width) in multiples of the encoder's square.
    """

    kind: Literal["anyres"] = "anyres"
    pinpoints: tuple[tuple[int, int], ...]


ImageFit = Annotated[CropImage | PadImage | AnyResImage, Field(discriminator="kind")]


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
    num_projected_tokens: int | None = None
    """Image tokens that the projector makes of a square's features; None: one a feature."""

    @property
    def num_features(self) -> int:
        """Features of one square."""
        return (self.size // self.patch_size) ** 2 + self.num_extra_tokens


class TextSpec(Config):
    """What the language model takes: its longest row, and the ids that a picture and padding stand for."""

    max_length: int
    image_token_id: int
    pad_token_id: int
    vocab_size: int
    """Rows of the language model's embedding, before the image token is added."""


def num_image_tokens(spec: ImageSpec, width: int, height: int) -> int:
    """How many tokens a picture of `width` x `height` pixels costs. Tokenizer, packer and model all ask here.

    Under AnyRes that is the whole picture's square, the canvas without the patches that are padding alone, and one
    line end a row of patches, rounded as `LlavaNextProcessor` rounds (LLaVA's own code differs for some sizes).

    Raises:
        InputError: no canvas takes the picture.
    """
    base = spec.num_features if spec.num_projected_tokens is None else spec.num_projected_tokens
    if not isinstance(spec.fit, AnyResImage):
        return base
    num_rows, num_columns = unpadded_grid(spec, width, height)
    return base + num_rows * num_columns + num_rows


def canvas_size(spec: ImageSpec, width: int, height: int) -> tuple[int, int]:
    """(height, width) of the pinpoint that keeps most of a picture's pixels; then the least wasteful, then the first.

    Raises:
        InputError: a pinpoint that is no multiple of the square, or a picture so thin that it vanishes on all of them.
    """
    assert isinstance(spec.fit, AnyResImage), "only AnyRes has a canvas"
    best, best_rank = None, (0, 0)
    for pinpoint in spec.fit.pinpoints:
        if min(pinpoint) < 1 or any(side % spec.size for side in pinpoint):
            raise InputError(f"pinpoint {pinpoint} is not a multiple of the encoder's square of {spec.size} pixels")
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        rank = (kept, kept - pinpoint[0] * pinpoint[1])
        if kept and (best is None or rank > best_rank):
            best, best_rank = pinpoint, rank
    if best is None:
        raise InputError(f"a picture of {width} x {height} pixels is too long and thin for any of the pinpoints")
    return best


def unpadded_grid(spec: ImageSpec, width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of the canvas's patches without the padding around a picture, as transformers' `unpad_image`."""
    canvas_height, canvas_width = canvas_size(spec, width, height)
    patches = spec.size // spec.patch_size
    rows, columns = canvas_height // spec.size * patches, canvas_width // spec.size * patches
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - (rows - kept) // 2 * 2, columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - (columns - kept) // 2 * 2
