"""Which file is a sample's picture, and which it is shown when pictures are shuffled.

Owns: finding pictures in a folder by name or number, and the seeded exchange of pictures. Does not own decoding
(`data_pipeline.images`). Loads without torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.images import PICTURE_EXTENSIONS
from eval.splits import ImageId
from models.errors import InputError

_TRAILING_NUMBER = re.compile(r"(\d+)$")


def find_pictures(folder: Path, wanted: Sequence[tuple[ImageId, str | None]]) -> list[Path]:
    """The file of each (image id, file name or None) in `folder`.

    A file name is taken as it is. An id is a file's name, or its name without the extension, or, where it is a
    number, the number that a name ends with (262148 finds COCO_val2014_000000262148.jpg).

    Raises:
        InputError: no such folder, a picture that is missing (it names the first and counts the rest), or an id
            that two files answer to.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    by_id = _files_by_id(folder)
    found: list[Path] = []
    missing: list[str] = []
    for image_id, file_name in wanted:
        if file_name is not None:
            files = [folder / file_name] if (folder / file_name).is_file() else []
        else:
            files = by_id.get(str(image_id), []) or by_id.get(_as_number(str(image_id)), [])
        if len(files) > 1:
            raise InputError(f"{folder}: both {files[0].name} and {files[1].name} may be image {image_id}")
        if not files:
            missing.append(file_name if file_name is not None else f"of image {image_id}")
        found += files
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of {len(wanted)} pictures, the first is {missing[0]}")
    return found


def _files_by_id(folder: Path) -> dict[str, list[Path]]:
    """Every id that a file of the folder answers to; `#7` stands for the number 7."""
    by_id: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.removeprefix(".").lower() not in PICTURE_EXTENSIONS:
            continue
        number = _TRAILING_NUMBER.search(path.stem)
        for name in {path.name, path.stem} | ({_as_number(number.group())} if number else set()):
            by_id.setdefault(name, []).append(path)
    return by_id


def _as_number(text: str) -> str:
    return f"#{int(text)}" if text.isascii() and text.isdigit() else ""


def shuffle_pictures(pictures: Sequence[Path], seed: int) -> list[Path]:
    """Exchange the pictures so that no sample keeps its own; samples of one picture share the new one too.

    One random cycle through the different pictures (Sattolo's algorithm), so each is shown in another's stead exactly
    where that stood. Files with equal content are one picture.

    Raises:
        InputError: fewer than two different pictures.
    """
    contents = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in dict.fromkeys(pictures)}
    different = {content: path for path, content in reversed(contents.items())}
    if len(different) < 2:
        raise InputError(f"pictures can't be shuffled: all samples show the same one, {pictures[0]}")
    order = sorted(different)
    random.Random(seed).shuffle(order)
    successor = {content: different[order[place - 1]] for place, content in enumerate(order)}
    return [successor[contents[path]] for path in pictures]
