"""The photos and shards that the benchmarks of the data pipeline read.

Owns reading or drawing the photos and writing them as a set. Does not own any measurement.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from data_pipeline.index import ShardIndex

PACKAGES = ["webdataset", "transformers", "pillow", "torch", "numpy"]
"""Packages whose versions are part of every row about data."""


def jpegs(folder: Path | None, count: int) -> Iterator[bytes]:
    """`count` JPEG files, from a folder (again from its start where it holds fewer) or drawn."""
    if folder is None:
        yield from map(_drawn, range(count))
        return
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise InputError(f"{folder} holds no JPEGs")
    for number in range(count):
        yield paths[number % len(paths)].read_bytes()


def _drawn(seed: int) -> bytes:
    """An image with the smooth areas and edges of a photograph, 640 x 480."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    fine = generator.normal(0, 6, (480, 640, 1))
    pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)) + fine
    return as_jpeg(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def as_jpeg(image: Image.Image) -> bytes:
    """Encode an image as a JPEG of quality 90, as cameras store them."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_set(folder: Path, payloads: list[bytes]) -> ShardIndex:
    """Index a set of the images, each with a caption, in two tars."""
    folder.mkdir(exist_ok=True)
    import webdataset as wds

    from data_pipeline.index import ShardIndex
    from data_pipeline.index_build import build_index

    half = -(-len(payloads) // 2)  # two tars: the peer's loader gives each of its two workers whole shards
    for start in range(0, len(payloads), half):
        with (folder / f"{start:06d}.tar").open("wb") as stream, wds.TarWriter(stream, encoder=False) as writer:
            for number, payload in enumerate(payloads[start : start + half], start=start):
                writer.write({"__key__": f"{number:06d}", "jpg": payload, "txt": f"caption {number}".encode()})
    build_index(folder)
    return ShardIndex.open(folder)


def paths_of(index: ShardIndex) -> list[str]:
    """The paths of a set's tars, as webdataset takes them."""
    return [str(index.folder / name) for name in index.shard_names]
