"""Rows of tables: TSV, CSV, Excel, text columns, and parquet whose pictures are read when they are looked at.

Owns the formats and pictures inside of files. A path may be an address that fsspec opens.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from data_pipeline.download import open_remote
from data_pipeline.remote import is_remote
from eval.benchmarks.spreadsheet import sheet_rows
from models.common.errors import InputError, single_line

_LONGEST_FIELD = min(sys.maxsize, 2**31 - 1)
_SHORTEST_PICTURE = 256
_BLOCK = 2**22


def is_table(file: str) -> bool:
    """Whether the file is read here, by its ending."""
    return PurePosixPath(file).suffix in (".tsv", ".csv", ".txt", ".parquet", ".xlsx")


def read_table(file: str, columns: Sequence[str] = ()) -> tuple[list[dict[str, Any]], str]:
    """The rows, and the sha256 of the file; `columns` names those of a table without a header.

    Raises:
        InputError: the file is missing, or is no such table.
    """
    digest = _digest(file)
    try:
        if PurePosixPath(file).suffix == ".parquet":
            return _parquet_rows(file), digest
        if PurePosixPath(file).suffix == ".xlsx":
            with open_file(file) as stream:
                return sheet_rows(stream, file), digest
        return _text_rows(file, columns), digest
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{file} is no table of this kind: {single_line(error)}") from None


def open_file(file: str) -> IO[bytes]:
    """The bytes of a file here or at an address; raises InputError."""
    try:
        return open_remote(file) if is_remote(file) else Path(file).open("rb")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{file} can't be opened: {single_line(error)}") from None


def _digest(file: str) -> str:
    digest = hashlib.sha256()
    with open_file(file) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _text_rows(file: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "," if file.endswith(".csv") else "\t"
    with open_file(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        if columns:
            plain = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            return [dict(zip(columns, row, strict=False)) for row in plain if row]
        return [
            {key: value or None for key, value in row.items() if key is not None}
            for row in csv.DictReader(lines, delimiter=delimiter)
        ]


@dataclass(frozen=True)
class ParquetPicture:
    """A picture in a parquet file; `read` opens its row group, the last of which is kept.

    A list of pictures, such as the frames of a video, is asked about by its middle one, as LLaVA asks SEED-Bench.
    """

    file: str
    group: int
    row: int
    column: str
    digest: str
    """The sha256 of the picture's own file, by which rows of one picture are known."""

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{PurePosixPath(self.file).name}:{self.column}:{self.group}.{self.row}"

    def read(self) -> bytes:
        """The bytes of the picture's own file."""
        return _content(_pictures(self.file, self.group, self.column)[self.row]) or b""


def _content(value: Any) -> bytes | None:
    """The bytes in a cell: alone, in the hub's {bytes, path}, or of the middle one of a list."""
    if isinstance(value, list):
        value = value[len(value) // 2] if value else None
    content = value["bytes"] if isinstance(value, dict) else value
    return bytes(content) if content else None


@dataclass(frozen=True)
class Base64Picture:
    """A picture written as text."""

    text: str

    @property
    def name(self) -> str:
        """A digest, as it has no name."""
        return f"base64:{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def read(self) -> bytes:
        """The bytes of the picture's own file; raises InputError where it is no base64."""
        try:
            return base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{self.name}: not base64") from None


InlinePicture = ParquetPicture | Base64Picture


def base64_picture(value: Any) -> Base64Picture | None:
    """The picture that a long text without blanks is; None where it is a name or a number."""
    is_picture = isinstance(value, str) and len(value) >= _SHORTEST_PICTURE and " " not in value
    return Base64Picture(value) if is_picture else None


def _parquet_rows(file: str) -> list[dict[str, Any]]:
    """Values of all columns but pictures, which are named by where they stand."""
    parquet = _opened(file)
    schema = parquet.schema_arrow
    pictures = [field.name for field in schema if _holds_bytes(field.type)]
    others = [field.name for field in schema if field.name not in pictures]
    rows: list[dict[str, Any]] = []
    for group in range(parquet.num_row_groups):
        values = parquet.read_row_group(group, columns=others).to_pylist() if others else []
        values = values or [{} for _ in range(parquet.metadata.row_group(group).num_rows)]
        digests = {name: _digests(parquet, group, name) for name in pictures}
        for row, fields in enumerate(values):
            found = {
                name: ParquetPicture(file, group, row, name, digest)
                for name in pictures
                if (digest := digests[name][row]) is not None
            }
            rows.append({**fields, **found})
    return rows


def _digests(parquet: Any, group: int, name: str) -> list[str | None]:
    """The sha256 of each picture of a row group; None where there is none. Cells are looked at one by one."""
    cells = parquet.read_row_group(group, columns=[name]).column(name)
    contents = (_content(cell.as_py()) for cell in cells)
    return [None if content is None else hashlib.sha256(content).hexdigest() for content in contents]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa  # type: ignore[import-untyped]

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@lru_cache(maxsize=8)
def _opened(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return pq.ParquetFile(open_file(file))
    except pa.ArrowInvalid as error:
        raise InputError(f"{file} is no parquet: {single_line(error)}") from None


@lru_cache(maxsize=2)
def _pictures(file: str, group: int, column: str) -> list[Any]:
    found: list[Any] = _opened(file).read_row_group(group, columns=[column]).column(column).to_pylist()
    return found
