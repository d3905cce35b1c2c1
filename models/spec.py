"""Facts that both the data pipeline and the model rely on. Loads without torch.

Owns: the base class of every configuration value, what an image becomes (`ImageSpec`), what a text becomes
(`TextSpec`), which canvas an image's tiles are cut from, and the one function that computes how many image tokens an
image costs. Does not own pixels or weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from models.common.errors import InputError

IMAGE_TOKEN = "<image>"
"""The placeholder in text, as in LLaVA's format; one real row of the exported vocabulary, if the model has no other."""

IGNORE_INDEX = -100
"""The label of a position that carries no target (PyTorch's own convention)."""


Side = Annotated[int, Field(gt=0, le=10_000)]
"""Of a canvas in pixels: the largest takes as many as the largest image that is read."""

Name = Annotated[str, Field(min_length=1)]
"""Of something that a recipe lists."""

Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each channel over CLIP's training images, for values in [0, 1] (Radford et al. 2021, their released code)."""

ImageSizes = Sequence[tuple[int, int]]
"""(height, width) of images before resizing, in pixels, on the host; only AnyRes needs them."""

WHOLE = (0, 0)
"""Among them, instead of a size: this image is one square alone, without a canvas."""


class Config(BaseModel):
    """Base of all configuration values: frozen, and an unknown or mistyped key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SquareFit(Config):
    """An image becomes one square of the encoder's size."""

    is_tiled: ClassVar[bool] = False
    """Whether an image becomes a small whole image and the tiles of a canvas, so that its tokens depend on its size."""
    grid: ClassVar[None] = None
    """How patches become image tokens, where an image keeps its size and its tiles are its patches."""
    pinpoints: ClassVar[tuple[tuple[int, int], ...]] = ()
    """The canvases to choose from, as (height, width) in pixels."""
    max_squares: ClassVar[int | None] = None

    def most_tiles(self, size: int) -> int:
        """The largest number of squares of `size` pixels for one image."""
        del size
        return 1

    def padding(self, mean: Colour) -> tuple[int, int, int] | None:
        """The padding colour, eight bits a channel; None where the image is cropped. `mean` is in [0, 1]."""
        del mean
        return None


class CropImage(SquareFit):
    """Resize the shorter side to `size`, then crop the central square (CLIP's own preprocessing)."""

    kind: Literal["crop"] = "crop"


class PadImage(SquareFit):
    """Pad to a square with the encoder's mean colour (`mean`) or black, then resize to `size` (LLaVA-1.5's `pad`)."""

    kind: Literal["pad"] = "pad"
    colour: Literal["mean", "black"] = "mean"

    def padding(self, mean: Colour) -> tuple[int, int, int]:
        """The colour in eight bits, rounded down as in LLaVA."""
        if self.colour == "black":
            return 0, 0, 0
        red, green, blue = (int(channel * 255) for channel in mean)
        return red, green, blue


class StretchImage(SquareFit):
    """Resize both sides to `size`, whatever the proportions (SigLIP's own preprocessing)."""

    kind: Literal["stretch"] = "stretch"


class AnyResImage(Config):
    """Tiles of a high-resolution image together with a small whole one (LLaVA-NeXT).

    `pinpoints` are the canvases to choose from, as (height, width) in multiples of the encoder's square. `max_squares`:
    the tiles' features are shrunk where they are more than 1.1 squared times those of so many squares
    (LLaVA-OneVision's `anyres_max_9`); None: never.
    """

    kind: Literal["anyres"] = "anyres"
    pinpoints: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1)]
    max_squares: PositiveInt | None = None
    is_tiled: ClassVar[bool] = True
    grid: ClassVar[None] = None

    def padding(self, mean: Colour) -> tuple[int, int, int]:
        """Black, around the image on its canvas."""
        del mean
        return 0, 0, 0

    def most_tiles(self, size: int) -> int:
        """1 for the whole image, plus the tiles of the largest canvas."""
        return 1 + max(height * width // size**2 for height, width in self.pinpoints)


class PatchGrid(Config):
    """How a tower of native resolution cuts an image, and how what it makes of it becomes image tokens."""

    patch_size: PositiveInt
    """Pixels of a patch's side."""
    merge: PositiveInt
    """Patches of the side of a block that becomes one image token."""
    window: PositiveInt | None = None
    """Image tokens of the side of the windows in which some layers attend; None: all attend to the whole image."""
    table_side: PositiveInt | None = None
    """Side of the square table of learnt positions, stretched to each image; None: there is no table."""

    @property
    def factor(self) -> int:
        """Pixels of the side of what becomes one image token."""
        return self.patch_size * self.merge

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of a fitted image."""
        return height // self.patch_size, width // self.patch_size


class NativeImage(Config):
    """An image keeps its size and its proportions, rounded to whole image tokens, within bounds (Qwen-VL).

    Its tiles are its patches, block after block of those that become one image token.
    """

    kind: Literal["native"] = "native"
    grid: PatchGrid
    min_pixels: PositiveInt
    max_pixels: PositiveInt
    is_tiled: ClassVar[bool] = False
    pinpoints: ClassVar[tuple[tuple[int, int], ...]] = ()
    max_squares: ClassVar[int | None] = None

    def most_tiles(self, size: int) -> int:
        """The patches of the largest image."""
        return self.max_pixels // size**2

    def padding(self, mean: Colour) -> None:
        """Nothing is padded."""
        del mean

    def fitted(self, width: int, height: int, max_pixels: int | None = None) -> tuple[int, int]:
        """(height, width) that an image is resized to, as transformers' `smart_resize`.

        Args:
            max_pixels: a smaller bound than its own.

        Raises:
            InputError: one side is more than 200 times the other.
        """
        most, factor = min(self.max_pixels, max_pixels or self.max_pixels), self.grid.factor
        if max(height, width) > 200 * min(height, width):
            raise InputError(f"an image of {width} x {height} pixels is too long and thin: 200 to 1 is the limit")
        sides = round(height / factor) * factor, round(width / factor) * factor
        if sides[0] * sides[1] > most:
            scale = math.sqrt((height * width) / most)
            return _at_least(factor, height / scale), _at_least(factor, width / scale)
        if sides[0] * sides[1] < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
        return sides

    def num_tokens(self, height: int, width: int) -> int:
        """Image tokens of a fitted image."""
        return (height // self.grid.factor) * (width // self.grid.factor)


def _at_least(factor: int, side: float) -> int:
    return max(factor, math.floor(side / factor) * factor)


ImageFit = Annotated[CropImage | PadImage | StretchImage | AnyResImage | NativeImage, Field(discriminator="kind")]


class ImageSpec(Config):
    """The vision encoder's input: `size` x `size` pixels, and how many tokens come out of one such square.

    At native resolution the squares are patches, so `size` is `patch_size`.

    `mean` and `std` are per channel, for pixel values scaled to [0, 1].
    """

    size: int
    patch_size: int
    fit: ImageFit
    mean: Colour
    std: tuple[float, float, float]
    num_extra_tokens: int = 0
    """Tokens in addition to the patches, such as a CLS token that is kept."""
    num_projected_tokens: int | None = None
    """Image tokens that the projector makes from a square's features; None: one per feature."""

    @property
    def several_are_whole(self) -> bool:
        """Whether each of a sample's several images is one square alone, as in LLaVA-OneVision."""
        return self.fit.is_tiled and self.fit.max_squares is not None

    @property
    def num_features(self) -> int:
        """Features of one square."""
        return (self.size // self.patch_size) ** 2 + self.num_extra_tokens


class TextSpec(Config):
    """The language model's input: its longest row, and the ids of the image token and of padding."""

    max_length: int
    image_token_id: int
    pad_token_id: int
    vocab_size: int
    """Rows of the language model's embedding, before the image token is added."""
    image_token: str = IMAGE_TOKEN
    """How the tokenizer spells it; in data an image is IMAGE_TOKEN whatever the model."""
    grid: PatchGrid | None = None
    """Set where an image token's position is its row and column in the image (M-RoPE), not its place in the text."""


def num_image_tokens(spec: ImageSpec, width: int, height: int) -> int:
    """How many tokens an image of `width` x `height` pixels costs. Tokenizer, packer and model all use this function.

    Under AnyRes that is the whole image's square, the canvas without the patches that are padding alone, and one
    newline per row of patches, rounded as `LlavaNextProcessor` rounds (LLaVA's own code differs for some sizes). The
    sides of an image that is `WHOLE` are 0.

    Raises:
        InputError: no canvas takes the image.
    """
    if spec.fit.grid is not None:
        return spec.fit.num_tokens(*spec.fit.fitted(width, height))
    base = spec.num_features if spec.num_projected_tokens is None else spec.num_projected_tokens
    if not spec.fit.is_tiled:
        return base
    num_rows, num_columns = shrunk_grid(spec, *unpadded_grid(spec, width, height))
    return base + num_rows * num_columns + num_rows


def shrunk_grid(spec: ImageSpec, num_rows: int, num_columns: int) -> tuple[int, int]:
    """(rows, columns) that are left of an unpadded grid under `max_squares`, as in `LlavaOnevisionProcessor`."""
    assert spec.fit.is_tiled, "only AnyRes has a canvas"
    if spec.fit.max_squares is None:
        return num_rows, num_columns
    ratio = math.sqrt(num_rows * num_columns / (spec.fit.max_squares * (spec.size // spec.patch_size) ** 2))
    return (int(num_rows // ratio), int(num_columns // ratio)) if ratio > 1.1 else (num_rows, num_columns)


def canvas_size(spec: ImageSpec, width: int, height: int) -> tuple[int, int]:
    """(height, width) of the pinpoint that keeps most of an image's pixels; ties go to the smallest, then the first.

    Raises:
        InputError: a pinpoint that is no multiple of the square, or an image whose shorter side rounds to 0 on all.
    """
    assert spec.fit.is_tiled, "only AnyRes has a canvas"
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
        raise InputError(f"an image of {width} x {height} pixels is too long and thin for any of the pinpoints")
    return best


def unpadded_grid(spec: ImageSpec, width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of the canvas's patches without the padding around an image, as transformers' `unpad_image`.

    A `WHOLE` image has one row, of no patch and the newline.
    """
    if (height, width) == WHOLE:
        return 1, 0
    canvas_height, canvas_width = canvas_size(spec, width, height)
    patches = spec.size // spec.patch_size
    rows, columns = canvas_height // spec.size * patches, canvas_width // spec.size * patches
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - (rows - kept) // 2 * 2, columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - (columns - kept) // 2 * 2
