"""JPEG -> 336 x 336: ours against the Hugging Face CLIP processor's Pillow path, and how much the pixels differ.

Owns the sizes, the ways of decoding that are compared and the peer's processor. `tools.dev.bench.photos` owns
the photos.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_pipeline.images import fit, open_image
from tools.dev.bench.measure import compare, per_core_second
from tools.dev.bench.photos import PACKAGES, as_jpeg
from tools.shards.write import shrink

if TYPE_CHECKING:
    from models.spec import ImageSpec
    from tools.dev.bench.measure import Row

SIZE = 336
SIZES = [(640, 480), (1024, 768), (4000, 3000)]
_PIXELS_A_ROUND = 4_000_000
"""So many photos of one size as hold these pixels are worked on in turn, two at least."""


def clip_processor() -> Any:
    """The peer's processor: Hugging Face's, by Pillow, at 336 x 336."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from models.spec import CLIP_MEAN, CLIP_STD

    square = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )


def image_spec() -> ImageSpec:
    """Our pipeline's settings that ask for the same pixels as `clip_processor`."""
    from models.spec import CLIP_MEAN, CLIP_STD, CropImage, ImageSpec

    return ImageSpec(size=SIZE, patch_size=14, fit=CropImage(), mean=CLIP_MEAN, std=CLIP_STD)


def image_rows(photos: Sequence[bytes], rounds: int) -> list[Row]:
    """Each size by each way of decoding; photos are first resized to that size and re-encoded."""
    rows: list[Row] = []
    for size in SIZES:
        count = min(len(photos), max(2, _PIXELS_A_ROUND // (size[0] * size[1])))
        payloads = [as_jpeg(open_image(photo).resize(size, Image.Resampling.BICUBIC)) for photo in photos[:count]]
        shrunk = [shrink(payload, SIZE) for payload in payloads]
        for what, sources, at_least in (
            ("exact", payloads, None),
            ("scaled", payloads, SIZE),
            ("exact, from shards made with --resize", shrunk, None),
        ):
            ours = partial(_ours, at_least=at_least)
            name = f"JPEG {size[0]}x{size[1]} -> {SIZE}, {what} ({_differences(ours, sources, payloads)})"
            rates = (_rate(ours, sources), _rate(_peer(), payloads))
            rows.append(compare(name, "images per core-second", *rates, rounds=rounds, packages=PACKAGES))
    return rows


def _ours(payload: bytes, at_least: int | None) -> Any:
    return fit(open_image(payload, at_least=at_least), image_spec())


def _peer() -> Callable[[bytes], Any]:
    processor = clip_processor()
    return lambda payload: processor(Image.open(io.BytesIO(payload)), return_tensors="np")


def _rate(work: Callable[[bytes], Any], payloads: Sequence[bytes]) -> Callable[[], float]:
    def run() -> int:
        for payload in payloads:
            work(payload)
        return len(payloads)

    return per_core_second(run)


def _differences(ours: Callable[[bytes], Any], sources: Sequence[bytes], payloads: Sequence[bytes]) -> str:
    """How much our pixels differ from the peer's, before scaling, in levels of 255."""
    processor = clip_processor()

    def stock(payload: bytes) -> Any:
        image = Image.open(io.BytesIO(payload))
        return processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]

    apart = np.concatenate(
        [
            np.abs(ours(source).astype(int).transpose(2, 0, 1) - stock(payload)).ravel()
            for source, payload in zip(sources, payloads, strict=True)
        ]
    )
    return f"pixels differ by {apart.mean():.2f} of 255, 99 % of them by {np.percentile(apart, 99):.0f} at most"
