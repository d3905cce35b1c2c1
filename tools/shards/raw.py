"""Raw data -> a list of samples still to be written: which pictures, which text.

Owns the formats that people have (LLaVA's JSON, tables of captions, folders) and finding what is wrong with them before
anything is written. Does not own tars (`tools.shards.write`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.images import PICTURE_EXTENSIONS
from data_pipeline.record import check_turns, parse_conversation
from models.errors import InputError

PICTURE_FIELDS = ("file_name", "image", "image_path", "filepath", "file")
CAPTION_FIELDS = ("caption", "text", "title")


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample to be written. Exactly one of `caption` and `record` is given."""

    pictures: tuple[Path, ...]
    caption: str | None = None
    """Goes into KEY.txt."""
    record: Mapping[str, Any] | None = None
    """Goes into KEY.json."""


def read_llava(path: Path, images: Path) -> list[RawSample]:
    """LLaVA's format: [{"id", "image": FILE or [FILE, …] or absent, "conversations": […]}, …].

    Raises:
        InputError: missing, empty, another shape, or a record (named) without its picture or with bad turns.
    """
    return [_llava_sample(row, where, images) for row, where in _rows(path)]


def _llava_sample(row: Mapping[str, Any], where: str, images: Path) -> RawSample:
    where = f"{where} ({row['id']})" if "id" in row else where
    if "conversations" not in row:
        raise InputError(f"{where} has no `conversations`; this is not LLaVA's format")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: `image` must be a file name or a list of them")
    pictures = tuple(existing(images, name, where) for name in names)
    try:
        check_turns(parse_conversation(row["conversations"]), len(pictures))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    record = {key: row[key] for key in ("id", "conversations") if key in row}
    return RawSample(pictures, record=record)


def read_captions(path: Path, images: Path, prompt: str) -> list[RawSample]:
    """A table (JSON, JSON Lines, CSV with a heading, or parquet) of file names and captions.

    Raises:
        InputError: missing, empty, columns that are not known, or a row (named) without its picture or caption.
    """
    found = []
    for row, where in _rows(path):
        name = _field(row, PICTURE_FIELDS, where)
        caption = _field(row, CAPTION_FIELDS, where)
        found.append(captioned(existing(images, name, where), caption, prompt))
    return found


def read_folder(folder: Path, prompt: str) -> list[RawSample]:
    """Every picture below a folder, with the text of the .txt beside it.

    Raises:
        InputError: no such folder, no pictures in it, or a picture (named) without text.
    """
    if not folder.is_dir():
        raise InputError(f"no directory {folder}")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in PICTURE_EXTENSIONS)
    if not pictures:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_EXTENSIONS))})")
    found = []
    for picture in pictures:
        text = picture.with_suffix(".txt")
        if not text.is_file():
            raise InputError(f"{picture} has no text: put its caption into {text.name} beside it, or use --captions")
        found.append(captioned(picture, _read_text(text).strip(), prompt))
    return found


def captioned(picture: Path, caption: str, prompt: str) -> RawSample:
    """A picture with its text, and what the user said before it, if anything."""
    if prompt:
        return RawSample((picture,), record={"prompt": prompt, "text": caption})
    return RawSample((picture,), caption=caption)


def existing(images: Path, name: str, where: str) -> Path:
    """The path of a picture; `where` names the record in the error if it is missing."""
    path = images / name
    if not path.is_file():
        raise InputError(f"{where}: no picture {path}")
    return path


def _field(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if isinstance(row.get(name), str) and row[name].strip():
            return str(row[name]).strip()
    raise InputError(f"{where}: none of the fields {', '.join(names)} holds text; found {', '.join(map(str, row))}")


def _rows(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The records of a file, each with the words that name it in an error."""
    readers: Mapping[str, Callable[[Path], list[Any]]] = {
        ".json": _json,
        ".jsonl": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: read by its ending, one of {', '.join(readers)}")
    rows = readers[path.suffix](path)
    if not rows:
        raise InputError(f"{path} is empty: no records in it")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: record {number} is a {type(row).__name__}, expected an object")
        yield row, f"{path}: record {number}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, expected a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def _json(path: Path) -> list[Any]:
    text = _read_text(path)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a list of records")
    return content


def _json_lines(path: Path) -> list[Any]:
    found = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON: {error}") from None
    return found


def _csv(path: Path) -> list[Any]:
    try:
        return list(csv.DictReader(_read_text(path).splitlines(keepends=True), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}") from None


def _parquet(path: Path) -> list[Any]:
    """The columns that name pictures and captions, row by row; others are not read."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    if not path.is_file():
        raise InputError(f"{path} is a directory, expected a file" if path.is_dir() else f"no file {path}")
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = [name for name in table.schema_arrow.names if name in (*PICTURE_FIELDS, *CAPTION_FIELDS)]
        return table.read(columns=names or None).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not parquet: {' '.join(str(error).split())}") from None
