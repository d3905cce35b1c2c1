"""What a published VLM does to an image: its processor's values as an `ImageFit`, or a refusal where they are others.

A processor of whose steps one is not known here would give training other pixels than serving, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.common.errors import InputError
from models.encoders.pretrained import with_sides
from models.published.family import PublishedFacts
from models.spec import AnyResImage, CropImage, ImageFit, PadImage, StretchImage

BICUBIC = 3
_PROCESSOR_FILES = (".json", ".jinja", ".model", ".txt")


def open_published_processor(facts: PublishedFacts) -> Any:
    """The directory's own processor, which nobody changes, since it is opened once as long as its files stay the same.

    Raises InputError where it is not on this machine or does not open.
    """
    if facts.directory is None:
        raise InputError(f"{facts.source}: its processor is not on this machine; fetch the model")
    files = (file for file in sorted(facts.directory.iterdir()) if file.suffix in _PROCESSOR_FILES)
    return _opened(facts.directory, tuple((file.name, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _opened(directory: Path, files: tuple[tuple[str, int], ...]) -> Any:
    from models.opening import open_processor

    del files  # of another time it is another processor
    return open_processor(directory)


def image_fit(facts: PublishedFacts, processor: Any) -> ImageFit:
    """How the processor makes squares of an image.

    Raises:
        InputError: it does not make what the tower takes, or by steps that are not known here.
    """
    images, side = processor.image_processor, int(with_sides(facts.config.vision_config.to_dict())["image_size"])
    kind = type(images).__name__.removesuffix("Fast").removesuffix("Pil")
    known = _FITS.get(kind)
    if known is None:
        raise InputError(
            f"{facts.source}: its images are made by {kind}, which is not known here; known are {', '.join(_FITS)}"
        )
    if int(images.resample) != BICUBIC or not images.do_resize:
        raise InputError(f"{facts.source}: {kind} resizes by another filter than bicubic, or not at all")
    sides = _sides(images)
    if sides != {side}:
        raise InputError(
            f"{facts.source}: {kind} makes squares of {sorted(sides)} pixels, and the tower takes {side}; take the"
            " preprocessor that came with the weights"
        )
    return known(facts, images)


def channel_statistics(processor: Any) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of each channel for pixel values in [0, 1], whatever the processor's own scale."""
    images = processor.image_processor
    scale = float(images.rescale_factor) * 255
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    return [value / scale for value in images.image_mean], [value / scale for value in images.image_std]


def _sides(images: Any) -> set[int]:
    """Sides in pixels of the squares that the processor makes."""
    size = dict(images.size)
    found = {size["shortest_edge"]} if size.get("shortest_edge") else {size["height"], size["width"]}
    crop = getattr(images, "crop_size", None) if getattr(images, "do_center_crop", False) else None
    if crop:
        found |= {dict(crop)["height"], dict(crop)["width"]}
    return {int(side) for side in found}


def _clip(facts: PublishedFacts, images: Any) -> ImageFit:
    if getattr(images, "do_pad", False):
        padding = [int(255 * value) for value in images.image_mean]
        return PadImage(colour="mean" if any(padding) else "black")
    if not images.do_center_crop:
        raise InputError(f"{facts.source}: its processor keeps an image's proportions, and the tower takes squares")
    return CropImage()


def _siglip(facts: PublishedFacts, images: Any) -> ImageFit:
    del facts, images
    return StretchImage()


def _next(facts: PublishedFacts, images: Any) -> ImageFit:
    del facts
    return AnyResImage(pinpoints=_pinpoints(images))


def _onevision(facts: PublishedFacts, images: Any) -> ImageFit:
    ratio = str(getattr(facts.config, "vision_aspect_ratio", "anyres_max_9"))
    return AnyResImage(pinpoints=_pinpoints(images), max_squares=int(ratio.removeprefix("anyres_max_")))


def _pinpoints(images: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in images.image_grid_pinpoints)


_FITS: Mapping[str, Callable[[PublishedFacts, Any], ImageFit]] = {
    "CLIPImageProcessor": _clip,
    "LlavaImageProcessor": _clip,
    "SiglipImageProcessor": _siglip,
    "LlavaNextImageProcessor": _next,
    "LlavaOnevisionImageProcessor": _onevision,
}
