"""A named data set -> a directory of its files: downloaded, checked, unpacked; complete or absent.

Owns the order of work and the processing of complete files. Does not own the addresses
(`tools.shards.sources`), the transfer of one file (`tools.shards.download`) nor tables of single images' addresses
(`tools.shards.images`).

    .OUT.fetching/NAME.part -> NAME (checked) -> unpacked, marked done -> … -> OUT
"""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from models.common.documents import parse
from models.common.errors import InputError
from models.common.files import new_file
from tools.shards.download import download
from tools.shards.sources import SOURCES, Source, SourceFile

_DONE = ".done"
"""Has an empty file for each file of the source that is complete."""


def source_named(name: str) -> Source:
    """A row of the table.

    Raises:
        InputError: no such name; the message lists those there are.
    """
    if name not in SOURCES:
        raise InputError(f"no data set {name!r} to fetch; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def fetch_source(name: str, out: Path, *, base_url: str | None = None, progress: bool = False) -> Source:
    """Fetch every file of a data set to `out`, resuming an interrupted call.

    Args:
        base_url: a mirror that serves the files under the same paths.

    Raises:
        InputError: an unknown name, `out` exists, or a file (named) that cannot be fetched, is not as expected, or is a
    zip that would write outside its directory.
    """
    source = source_named(name)
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise InputError(f"--base-url {base_url}: expected an address that begins with http:// or https://")
    if out.exists():
        raise InputError(f"{out} exists already: choose another directory, or remove it first")
    work = out.parent / f".{out.name}.fetching"
    _prepare(work, name)
    for file in source.files:
        mark = work / _DONE / file.name
        if not mark.exists():
            _fetch_file(file, work, base_url, progress)
            mark.touch()
    shutil.rmtree(work / _DONE)
    work.rename(out)
    return source


def _prepare(work: Path, name: str) -> None:
    """Resume in the directory of an interrupted run; another data set's is not touched."""
    mark = work / _DONE / f"of-{name}"
    if work.exists() and not mark.exists():
        raise InputError(f"{work} holds another unfinished download: finish it, remove it or choose another directory")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _fetch_file(file: SourceFile, work: Path, base_url: str | None, progress: bool) -> None:
    url = file.url if base_url is None else base_url.rstrip("/") + urlsplit(file.url).path
    folder = work / file.folder
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    if not target.exists():
        download(url, target, num_bytes=file.num_bytes, sha256=file.sha256, progress=progress)
    try:
        _take(file, target, progress)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        target.unlink()
        raise InputError(f"{url} cannot be used ({error}); it was removed: try again, or name another mirror") from None
    except OSError as error:
        raise InputError(f"{target}: cannot be unpacked ({error.strerror or error})") from None


def _take(file: SourceFile, target: Path, progress: bool) -> None:
    """Check that a file can be read, and unpack or keep it; raises ValueError or BadZipFile if it cannot."""
    if target.suffix == ".zip":
        unpack(target, target.parent, progress=progress)
        target.unlink()
    elif target.suffix == ".json":
        try:
            parse(target.read_bytes(), "the JSON")
        except InputError as error:
            raise ValueError(str(error)) from None
    elif file.columns:
        _add_heading(target, file.columns)


def unpack(path: Path, folder: Path, *, progress: bool = False) -> None:
    """Unpack a zip below `folder`, each member checked against its crc32. Checks all names before it writes.

    Raises:
        BadZipFile: damaged, a name that leaves the folder, a link, or a password.
        InputError: more bytes than the disk has left.
    """
    from tqdm import tqdm

    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            _check_member(member)
        needed, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"{path} unpacks to {needed} bytes, {folder} has {free} left: make room and go on")
        for member in tqdm(members, desc=f"unpack {path.name}", unit="file", disable=not progress):
            archive.extract(member, folder)


def _check_member(member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in member.filename or not name.parts:
        raise zipfile.BadZipFile(f"a member named {member.filename!r}; names must stay inside the archive")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise zipfile.BadZipFile(f"{member.filename!r} is a link; only files are unpacked")
    if member.flag_bits & 1:
        raise zipfile.BadZipFile(f"{member.filename!r} needs a password")


def _add_heading(path: Path, columns: tuple[str, ...]) -> None:
    """Prepend the columns' names to a tab-separated table, after checking every row."""
    heading = "\t".join(columns) + "\n"
    with (
        new_file(path) as temporary,
        path.open(encoding="utf-8", newline="\n") as source,
        temporary.open("w", encoding="utf-8") as stream,
    ):
        stream.write(heading)
        for number, line in enumerate(source, start=1):
            if line == heading and number == 1:
                continue
            if line.count("\t") != len(columns) - 1:
                raise ValueError(f"line {number} has not {len(columns)} columns")
            stream.write(line)
