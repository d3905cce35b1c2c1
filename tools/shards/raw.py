"""Raw data -> a list of samples still to be written: which images, which text.

Owns what the records that people have mean: LLaVA's and chats', captions, folders. Does not own the files' formats
(`tools.shards.tables`), whether a sample can be used (`tools.shards.examine`) nor tars (`tools.shards.write`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.image_kinds import IMAGE_EXTENSIONS, UNREADABLE_EXTENSIONS, image_kind
from data_pipeline.record import NO_VIDEO, VIDEO_FIELDS
from models.common.errors import InputError
from tools.shards.tables import CAPTION_FIELDS, CHAT_FIELDS, IMAGE_FIELDS, Row, read_rows, read_text

_LONGEST_NAME = 1000
"""Characters; a longer value is no file name."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample to be written. One of `caption` and `record` is given, or else `problem`."""

    images: tuple[Path | bytes, ...]
    """Files, or images that stood in the record itself."""
    caption: str | None = None
    """Goes into KEY.txt."""
    record: Mapping[str, Any] | None = None
    """Goes into KEY.json."""
    where: str = ""
    """What names the record in an error."""
    problem: str = ""
    """Why its record cannot be used, with its name."""


def collect(rows: Iterable[tuple[Row, str]], read: Callable[[Mapping[str, Any], str], RawSample]) -> list[RawSample]:
    """Read every record; one that cannot be used becomes a sample that says why, so that all of them are named."""
    found = []
    for row, where in rows:
        try:
            if isinstance(row, InputError):
                raise row
            found.append(read(row, where))
        except InputError as error:
            found.append(RawSample((), where=where, problem=str(error)))
    return found


def read_llava(path: Path, folder: Path | None) -> list[RawSample]:
    """LLaVA's format: [{"id", "image": FILE or [FILE, …] or absent, "conversations": […]}, …].

    `images` and `messages` (LLaMA-Factory, ms-swift), base64 and the hub's {"bytes", "path"} are taken as well.

    Raises:
        InputError: missing, empty, or another file format.
    """
    return collect(read_rows(path), lambda row, where: _llava_sample(row, where, folder))


def _llava_sample(row: Mapping[str, Any], where: str, folder: Path | None) -> RawSample:
    where = f"{where} ({row['id']})" if row.get("id") is not None else where
    chat = next((row[name] for name in CHAT_FIELDS if row.get(name) is not None), None)
    if chat is None:
        raise InputError(f"{where} has no `conversations`; this is not LLaVA's format")
    if video := next((name for name in VIDEO_FIELDS if row.get(name)), None):
        raise InputError(f"{where}: `{video}` names {NO_VIDEO}")
    image, images = row.get("image"), row.get("images")
    if image and images and images not in (image, [image]):
        raise InputError(f"{where} has both `image` and `images`, which differ: keep one")
    named = image or images or []
    values = named if isinstance(named, list) else [named]
    images = tuple(image_of(value, folder, where) for value in values)
    record = {key: row[key] for key in ("id",) if row.get(key) is not None} | {"conversations": chat}
    return RawSample(images, record=record, where=where)


def read_captions(path: Path, folder: Path | None, prompt: str) -> list[RawSample]:
    """A table (JSON, JSON Lines, CSV with a heading, or parquet) of images and captions.

    Raises:
        InputError: missing, empty, or columns that are not known.
    """
    return collect(read_rows(path), lambda row, where: _caption_sample(row, where, folder, prompt))


def _caption_sample(row: Mapping[str, Any], where: str, folder: Path | None, prompt: str) -> RawSample:
    image = next((row[name] for name in IMAGE_FIELDS if row.get(name)), None)
    captions = [row[name] for name in CAPTION_FIELDS if isinstance(row.get(name), str)]
    caption = next((text for text in captions if text.strip()), captions[0] if captions else None)
    for value, names in ((image, IMAGE_FIELDS), (caption, CAPTION_FIELDS)):
        if value is None:
            raise InputError(
                f"{where}: none of the fields {', '.join(names)} holds anything; found {', '.join(map(str, row))}"
            )
    assert caption is not None
    return captioned(image_of(image, folder, where), caption.strip(), prompt, where)


def read_folder(folder: Path, prompt: str) -> list[RawSample]:
    """Every image below a folder, known by its content or its ending, with the text of the .txt beside it.

    Raises:
        InputError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise InputError(f"no directory {folder}")
    images = sorted(path for path in folder.rglob("*") if _is_image(path))
    if not images:
        raise InputError(f"{folder} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")

    def read(row: Mapping[str, Any], where: str) -> RawSample:
        image: Path = row["image"]
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise InputError(f"{image} has no text: put its caption into {text.name} beside it, or use --captions")
        return captioned(image, read_text(text).strip(), prompt, where)

    return collect((({"image": image}, str(image)) for image in images), read)


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower().lstrip(".")
    if path.name.startswith(".") or suffix == "txt" or not path.is_file():
        return False
    return suffix in IMAGE_EXTENSIONS | UNREADABLE_EXTENSIONS or image_kind(first_bytes(path)) is not None


def first_bytes(source: Path | bytes) -> bytes:
    """The 32 bytes that say what kind of image a file is."""
    if isinstance(source, bytes):
        return source[:32]
    with source.open("rb") as stream:
        return stream.read(32)


def captioned(image: Path | bytes, caption: str, prompt: str, where: str = "") -> RawSample:
    """An image with its text, and what the user said before it, if anything."""
    if prompt:
        return RawSample((image,), record={"prompt": prompt, "text": caption}, where=where)
    return RawSample((image,), caption=caption, where=where)


def image_of(value: Any, folder: Path | None, where: str) -> Path | bytes:
    """The image that a record names or holds: a file name, base64, bytes, or the hub's {"bytes", "path"}.

    Raises:
        InputError: nothing of these, or a file that is missing.
    """
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        value = value.get("bytes") or value["path"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(f"{where}: an image is a file name, base64 or bytes; found a {type(value).__name__}")
    if (payload := _from_base64(value)) is not None:
        return payload
    if len(value) > _LONGEST_NAME:
        raise InputError(f"{where}: {len(value)} characters {value[:30]!r}… are no file name, and no image in base64")
    if folder is None:
        raise InputError(f"{where}: --images DIR is missing: the directory in which the file names begin")
    return existing(folder, value, where)


def _from_base64(text: str) -> bytes | None:
    """The image that a text holds in base64, with `data:image/…;base64,` before it or not; None where it holds none."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif len(text) < 64:
        return None
    try:
        payload = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return payload if image_kind(payload) is not None else None


def existing(folder: Path, name: str, where: str) -> Path:
    """The path of an image; `where` names the record in the error if it is missing."""
    path = folder / name
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # a name too long for the disk, or with a null byte in it
        pass
    raise InputError(f"{where}: no image {path}")
