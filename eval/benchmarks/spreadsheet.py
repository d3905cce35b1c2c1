"""Rows of an Excel sheet, as VLMEvalKit writes its predictions: the first sheet, with a header."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import IO, Any

from models.common.errors import InputError, single_line


def sheet_rows(stream: IO[bytes], file: str) -> list[dict[str, Any]]:
    """Each row by the header's names; empty cells are None, and whole numbers are integers.

    Raises:
        InputError: it is no .xlsx, or its header has an empty cell above values.
    """
    from openpyxl import load_workbook  # type: ignore[import-untyped]
    from openpyxl.utils.exceptions import InvalidFileException  # type: ignore[import-untyped]

    try:
        book = load_workbook(stream, read_only=True, data_only=True)
        return list(_rows(book.worksheets[0].iter_rows(values_only=True), file))
    except (zipfile.BadZipFile, InvalidFileException, KeyError, IndexError, SyntaxError) as error:
        raise InputError(f"{file} is no table of this kind: {single_line(error)}") from None


def _rows(lines: Iterator[tuple[Any, ...]], file: str) -> Iterator[dict[str, Any]]:
    header = next(lines, ())
    for line in lines:
        if all(value is None for value in line):
            continue
        if any(value is not None and name is None for name, value in zip(header, line, strict=False)):
            raise InputError(f"{file}: a column with values has no name in the first row")
        yield {str(name): _value(value) for name, value in zip(header, line, strict=False) if name is not None}


def _value(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float) or value is None else str(value)
