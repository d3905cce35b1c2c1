"""The image file of each sample, and the seeded exchange of images between samples.

Owns: finding images in a folder by name or number, images inside of other files, and the seeded exchange of images.
Does not own decoding (`data_pipeline.images`). Loads without torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from data_pipeline.images import IMAGE_EXTENSIONS, ImageError, check_header
from eval.entries import ImageId
from models.common.errors import InputError
from models.common.files import is_inside


class StoredImage(Protocol):
    """An image inside of another file."""

    @property
    def name(self) -> str:
        """What it is called in results."""

    def read(self) -> bytes:
        """The bytes of the image's own file; raises InputError where there are none."""


Shown = Path | StoredImage | None
"""What a sample shows: a file, an image inside of one, or nothing."""

_TRAILING_NUMBER = re.compile(r"\d+$")
_NUMBER = re.compile(r"\d+")


def shown_images(
    folder: Path, wanted: Sequence[tuple[ImageId, str | None]], *, seed: int | None
) -> tuple[list[Path], list[Path]]:
    """The images of samples, and which each is shown: its own, or with a seed another one's.

    The header of each is read, so that what is no image, or is beyond the limits, is named before a model is opened.

    Raises:
        InputError: as `find_images` and `shuffle_images`, or a file that is no image.
    """
    found = find_images(folder, wanted)
    check_images(found)
    return found, found if seed is None else shuffle_images(found, seed)


def find_images(folder: Path, wanted: Sequence[tuple[ImageId, str | None]]) -> list[Path]:
    """The file of each (image id, file name or None) in `folder`.

    A file name is taken as it is, and may not lead out of the folder. An id is a file's name, or its name without the
    extension, or, where it is a number, the number that a name ends with (262148 finds COCO_val2014_000000262148.jpg).

    Raises:
        InputError: no such folder, an image that is missing (it names the first and counts the rest), or an id
            that two files match.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images")
    by_id = _files_by_id(folder)
    found: list[Path] = []
    missing: list[str] = []
    for image_id, file_name in wanted:
        if file_name is not None:
            if not is_inside(file_name):
                raise InputError(f"{folder}: image {image_id} is called {file_name!r}, which leads out of the folder")
            files = [folder / file_name] if (folder / file_name).is_file() else []
        else:
            files = next((by_id[name] for name in ids_of(str(image_id)) if name in by_id), [])
        if len(files) > 1:
            raise InputError(f"{folder}: both {files[0].name} and {files[1].name} may be image {image_id}")
        if not files:
            missing.append(file_name if file_name is not None else f"of image {image_id}")
        found += files
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of {len(wanted)} images, the first is {missing[0]}")
    return found


def _files_by_id(folder: Path) -> dict[str, list[Path]]:
    """Every id that a file of the folder matches; `#7` stands for the number 7."""
    by_id: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.removeprefix(".").lower() not in IMAGE_EXTENSIONS:
            continue
        for name in {path.name, *ids_of(path.stem, trailing=True)}:
            by_id.setdefault(name, []).append(path)
    return by_id


def ids_of(text: str, *, trailing: bool = False) -> list[str]:
    """What `text` may be found by: itself, and `#7` for a number such as 007; `trailing`: that a name ends with."""
    number = _TRAILING_NUMBER.search(text) if trailing else _NUMBER.fullmatch(text)
    return [text, *([f"#{int(number.group())}"] if number and number.group().isascii() else [])]


def content_of(image: Path | StoredImage) -> bytes:
    """The bytes of an image's file."""
    return image.read_bytes() if isinstance(image, Path) else image.read()


def digests_of(images: Sequence[Shown]) -> list[str | None]:
    """The sha256 of each image's file, in their order; None where nothing is shown."""
    found = {
        image: hashlib.sha256(content_of(image)).hexdigest() for image in dict.fromkeys(images) if image is not None
    }
    return [None if image is None else found[image] for image in images]


def check_images(images: Iterable[Shown]) -> None:
    """Read the header of each image, so that what is none is named before a model is opened; raises InputError."""
    for image in dict.fromkeys(images):
        if isinstance(image, Path):
            check_header(image)
        elif image is not None:
            try:
                check_header(image.read())
            except ImageError as error:
                raise InputError(f"{image.name}: {error}") from None


_Image = TypeVar("_Image", Path, Shown)


def shuffle_images(images: Sequence[_Image], seed: int) -> list[_Image]:
    """Exchange the images so that no sample keeps its own; samples of one image share the new one too.

    One random cycle through the different images (Sattolo's algorithm), so each image replaces exactly one other
    everywhere. Files with equal content are one image. Samples that show nothing go on showing nothing.

    Raises:
        InputError: fewer than two different images.
    """
    contents = {image: digest for image, digest in zip(images, digests_of(images), strict=True) if digest is not None}
    different = {content: image for image, content in reversed(contents.items())}
    if len(different) < 2:
        raise InputError(f"images can't be shuffled: all samples show the same one, {images[0]}")
    order = sorted(different)
    random.Random(seed).shuffle(order)
    successor = {content: different[order[place - 1]] for place, content in enumerate(order)}
    return [successor[contents[image]] if image is not None else image for image in images]
