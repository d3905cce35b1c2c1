"""Pictures in a table of their own, as the hub has those of GQA: found by their id, as files of a folder are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from eval.benchmarks.fields import find
from eval.benchmarks.tables import ParquetPicture, read_table
from eval.entries import ImageId
from models.common.errors import InputError

_ID = "id|image_id|imageId|file_name"


def holds_tables(path: Path) -> bool:
    """Whether the pictures lie in this parquet file, or in those of this folder."""
    return path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))


def find_in_tables(path: Path, wanted: Sequence[tuple[ImageId, str | None]]) -> list[ParquetPicture]:
    """The picture of each (image id, file name or None); a name's folder and ending may be left out in the table.

    Raises:
        InputError: a table without ids or pictures, a picture that is missing, or an id that two rows have.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    by_id: dict[str, ParquetPicture] = {}
    for file in files:
        for row in read_table(str(file))[0]:
            key = find(row, _ID)
            picture = next((value for value in row.values() if isinstance(value, ParquetPicture)), None)
            if key is None or picture is None:
                raise InputError(f"{file}: pictures with an id each are needed ({' or '.join(_ID.split('|'))})")
            if str(key) in by_id:
                raise InputError(f"{path}: two pictures are called {key}")
            by_id[str(key)] = picture
    found = [_one_of(by_id, str(image_id if name is None else name)) for image_id, name in wanted]
    missing = [name or image_id for (image_id, name), each in zip(wanted, found, strict=True) if each is None]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of {len(wanted)} images, the first is {missing[0]}")
    return [picture for picture in found if picture is not None]


def _one_of(by_id: dict[str, ParquetPicture], name: str) -> ParquetPicture | None:
    path = PurePosixPath(name)
    return next((by_id[each] for each in (name, path.name, path.stem) if each in by_id), None)
