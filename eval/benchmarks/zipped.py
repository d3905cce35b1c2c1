"""Pictures inside of a zip archive, as some benchmarks publish them: found as in a folder, and not unpacked."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from data_pipeline.images import IMAGE_EXTENSIONS
from eval.entries import ImageId
from eval.images import ids_of
from models.common.errors import InputError, single_line


@dataclass(frozen=True)
class ZipPicture:
    """A member of an archive."""

    archive: str
    member: str

    @property
    def name(self) -> str:
        """Its path in the archive."""
        return self.member

    def read(self) -> bytes:
        """The bytes of the picture's own file; raises InputError where the archive is damaged there."""
        try:
            return _opened(self.archive).read(self.member)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise InputError(f"{self.archive}, {self.member}: {single_line(error)}") from None


def is_archive(path: Path) -> bool:
    """Whether the pictures lie in this archive instead of a folder."""
    return path.suffix.lower() == ".zip" and not path.is_dir()


def find_zipped(archive: Path, wanted: Sequence[tuple[ImageId, str | None]]) -> list[ZipPicture]:
    """The picture of each (image id, file name or None), as `eval.images.find_images` finds files.

    A file name may leave out the folders that the archive begins with.

    Raises:
        InputError: no such archive, a picture that is missing, or a name that two members have.
    """
    by_name, by_id = _members(str(archive))
    found: list[ZipPicture] = []
    missing: list[str] = []
    for image_id, file_name in wanted:
        keys = [file_name] if file_name is not None else ids_of(str(image_id))
        table = by_id if file_name is None else by_name
        members = next((table[key] for key in keys if key in table), [])
        if len(members) > 1:
            raise InputError(f"{archive}: both {members[0]} and {members[1]} may be image {image_id}")
        missing += [] if members else [str(image_id)]
        found += [ZipPicture(str(archive), member) for member in members]
    if missing:
        raise InputError(f"{archive} lacks {len(missing)} of {len(wanted)} images, the first is {missing[0]}")
    return found


@lru_cache(maxsize=4)
def _opened(archive: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except FileNotFoundError:
        raise InputError(f"{archive}: no such archive of images") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive} can't be read: {single_line(error)}") from None


def _members(archive: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The pictures by every end of their paths, and by every id that they match."""
    by_name: dict[str, list[str]] = {}
    by_id: dict[str, list[str]] = {}
    for member in sorted(_opened(archive).namelist()):
        path = PurePosixPath(member)
        if path.suffix.removeprefix(".").lower() not in IMAGE_EXTENSIONS or path.parts[0] == "__MACOSX":
            continue
        for start in range(len(path.parts)):
            by_name.setdefault("/".join(path.parts[start:]), []).append(member)
        for name in {path.name, *ids_of(path.stem, trailing=True)}:
            by_id.setdefault(name, []).append(member)
    return by_name, by_id
