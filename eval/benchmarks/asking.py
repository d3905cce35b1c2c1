"""What is asked about a row, and the picture that it shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.images import IMAGE_EXTENSIONS, header_size
from eval.benchmarks.fields import filled
from eval.benchmarks.parquet_images import find_in_tables, holds_tables
from eval.benchmarks.row import Row
from eval.benchmarks.spec import SUFFIXES, Benchmark
from eval.benchmarks.tables import Base64Picture, ParquetPicture
from eval.benchmarks.zipped import find_zipped, is_archive
from eval.images import Shown, StoredImage, content_of, find_images
from models.common.errors import InputError


def prompt_of(benchmark: Benchmark, row: Row) -> str:
    """The question in the benchmark's form, its options and its suffix."""
    form, question = benchmark.form_of(row.fields), row.question
    for old, new in form.replace.items():
        question = question.replace(old, new)
    lines = [filled(form.ask, {**row.fields, "question": question})]
    if form.options == "lines":
        lines += [f"{letter}. {text}" for letter, text in row.options.items()]
    return "\n".join(lines) + SUFFIXES[form.suffix]


def pictures_of(rows: Sequence[Row], folder: Path | None) -> list[Shown]:
    """The picture of each row: inside of the benchmark's files, in `folder`, a zip or parquet; None where it has none.

    Raises:
        InputError: a picture is missing, or pictures are named and no folder is.
    """
    wanted = [row.picture for row in rows if isinstance(row.picture, str | int)]
    if wanted and folder is None:
        raise InputError(f"the pictures are files, the first is {wanted[0]}: give the folder with --images")
    names = [_looked_up(name) for name in wanted]
    files: Sequence[Shown] = ()
    if folder is not None and names:
        files = _found(folder, names)
    found = iter(files)
    return [next(found) if isinstance(row.picture, str | int) else _stored(row) for row in rows]


def with_sizes(benchmark: Benchmark, rows: Sequence[Row], pictures: Sequence[Shown]) -> tuple[Row, ...]:
    """Rows whose answers are boxes, with `width` and `height` in pixels of their pictures where the files lack them."""
    if not benchmark.form.parse.startswith("box."):
        return tuple(rows)
    return tuple(
        row if picture is None or row.fields.get("width") is not None else _sized(row, picture)
        for row, picture in zip(rows, pictures, strict=True)
    )


def _sized(row: Row, picture: Path | StoredImage) -> Row:
    width, height = header_size(io.BytesIO(content_of(picture)))
    return replace(row, fields={**row.fields, "width": width, "height": height})


def _found(folder: Path, names: Sequence[tuple[str | int, str | None]]) -> Sequence[Shown]:
    if is_archive(folder):
        return find_zipped(folder, names)
    return find_in_tables(folder, names) if holds_tables(folder) else find_images(folder, names)


def _looked_up(name: str | int) -> tuple[str | int, str | None]:
    """A name with an image's ending is a file; anything else is an id."""
    is_file = isinstance(name, str) and Path(name).suffix.removeprefix(".").lower() in IMAGE_EXTENSIONS
    return name, str(name) if is_file else None


def _stored(row: Row) -> Shown:
    if row.picture is None or isinstance(row.picture, ParquetPicture | Base64Picture):
        return row.picture
    raise InputError(f"question {row.name}: its picture is {str(row.picture)[:40]!r}, neither a file nor an image")
