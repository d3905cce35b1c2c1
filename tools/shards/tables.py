"""Tables of the field -> rows: JSON, JSON Lines, CSV and its kin, parquet.

Owns the file formats. What a row means is in `tools.shards.raw`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.common.documents import parse
from models.common.errors import InputError
from models.common.files import split_lines

IMAGE_FIELDS = ("file_name", "image", "image_path", "filepath", "file", "images")
CAPTION_FIELDS = ("caption", "text", "title")
CHAT_FIELDS = ("conversations", "messages")
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

Row = Mapping[str, Any] | InputError
"""A record, or what is wrong with the line that should hold one."""


def read_rows(path: Path) -> Iterator[tuple[Row, str]]:
    """The records of a file, each with the words that name it in an error.

    Raises:
        InputError: missing, empty, or not of the format that its ending says.
    """
    readers: Mapping[str, Callable[[Path], Sequence[Any]]] = {
        ".json": _json,
        ".jsonl": _json_lines,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: read by its ending, one of {', '.join(readers)}")
    rows = readers[path.suffix](path)
    if not rows:
        raise InputError(f"{path} is empty: no records in it")
    for number, row in enumerate(rows):
        where = f"{path}: record {number}"
        if not isinstance(row, dict | InputError):
            raise InputError(f"{where} is a {type(row).__name__}, expected an object")
        yield row, where


def read_text(path: Path) -> str:
    """A file's text, a byte order mark left out; InputError where it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, expected a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def _json(path: Path) -> list[Any]:
    text = read_text(path)
    if not text.strip():
        return []
    content = parse(text, path)
    if not isinstance(content, list):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a list of records")
    return content


def _json_lines(path: Path) -> list[Any]:
    found = []
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        found.append(parse(line, f"{path}: line {number}"))
    return found


def _csv(path: Path) -> list[Any]:
    text = read_text(path)
    separator = _separator(path, text.split("\n", 1)[0].rstrip("\r"))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found: list[Any] = []
    try:
        for row in reader:
            found.append(row)
            num_fields = len(reader.fieldnames or ())
            if None in row:
                found[-1] = InputError(
                    f"{path}: line {reader.line_num} has {num_fields + len(row[None])} fields, the heading has"
                    f" {num_fields}; put a text that holds {_SEPARATORS[separator]} into quotes"
                )
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: line {reader.line_num}: {error}") from None
    return found


def _separator(path: Path, heading: str) -> str:
    """What separates the heading into names that are known."""
    if not heading:
        return ","
    for separator in _SEPARATORS:
        names = _names(heading, separator)
        if twice := sorted({name for name in names if names.count(name) > 1} & {*IMAGE_FIELDS, *CAPTION_FIELDS}):
            raise InputError(f"{path}: two columns are called {twice[0]}: name the other one differently")
        if set(names) & set(IMAGE_FIELDS) and set(names) & set(CAPTION_FIELDS):
            return separator
    raise InputError(
        f"{path}: its heading is {heading[:80]!r}; it must name a column of images ({', '.join(IMAGE_FIELDS)}) and one"
        f" of captions ({', '.join(CAPTION_FIELDS)}), separated by {', '.join(_SEPARATORS.values())}"
    )


def _names(heading: str, separator: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([heading], delimiter=separator), [])]
    except csv.Error:  # lines that end as on an old Macintosh
        return []


def _parquet(path: Path) -> list[Any]:
    """The columns that name images, captions and conversations, row by row; others are not read."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    if not path.is_file():
        raise InputError(f"{path} is a directory, expected a file" if path.is_dir() else f"no file {path}")
    known = ("id", *IMAGE_FIELDS, *CAPTION_FIELDS, *CHAT_FIELDS)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = [name for name in table.schema_arrow.names if name in known]
        return table.read(columns=names or None).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not parquet: {' '.join(str(error).split())}") from None
