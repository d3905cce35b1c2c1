"""Reads a tar's headers in one pass and raises an error for what it does not understand.

Owns the walk over 512-byte headers. Python's `tarfile` takes a damaged header after the first for the archive's end
and silently loses the rest; here a bad checksum, a cut file or an unknown member type is an error that gives the
position.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from models.common.errors import InputError

BLOCK = 512
MAX_LONG_HEADER_BYTES = 64 * 1024
"""Longest extended header that is read; real ones hold a path, and a larger one is an attack on memory."""

_OCTETS = re.compile(r"[0-9]{1,18}")
"""A PAX size: `str.isdigit` also takes digits that `int` does not."""

_REGULAR = b"0\0"
_DIRECTORY = b"5"
_SPARSE = b"S"
"""GNU's own sparse files; those of PAX are regular files with records GNU.sparse.* before them."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file of the archive: the location of its bytes, and its problem, if any."""

    name: str
    offset: int
    size: int
    problem: str = ""


class TarError(InputError):
    """A tar that cannot be read to its end."""


def read_members(path: Path) -> Iterator[TarMember]:
    """Every file of an uncompressed tar, in order, without directories; links and sparse files have a `problem`.

    Raises:
        TarError: compressed, cut short or damaged: nothing after this can be read.
    """
    with path.open("rb") as stream:
        yield from _walk(stream, str(path), os.fstat(stream.fileno()).st_size)


def _walk(stream: BinaryIO, where: str, total: int) -> Iterator[TarMember]:
    position, overrides = 0, dict[str, str]()
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if position == 0:
            _check_opening(header, where)
        if header == bytes(BLOCK):
            _check_end(stream, where, position)
            return
        if len(header) < BLOCK:
            raise TarError(f"{where}: cut short at byte {position}, no end-of-archive mark; make the shard again")
        _check_sum(header, where, position)
        size = _number(header[124:136], where, position)
        size = int(overrides.get("size", size))
        kind, start, name = header[156:157], position + BLOCK, overrides.get("path") or _name(header)
        if size < 0 or start + size > total:
            problem = f"cut short, the member at byte {position} needs {size} bytes"
            if kind in _REGULAR:
                yield TarMember(name, start, 0, problem)
            raise TarError(f"{where}: {problem}")
        if kind == _SPARSE:
            start = _behind_sparse_map(stream, header, start)
            overrides["sparse"] = "yes"
        position = start + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x", b"g"):
            overrides |= _extended(stream, kind, size, where)
            continue
        if "sparse" in overrides:
            name = overrides.get("sparse name", name)
            yield TarMember(name, start, size, f"{name!r} is a sparse file; make the tar without -S (--sparse)")
        elif kind in _REGULAR:
            yield TarMember(name, start, size)
        elif kind != _DIRECTORY:
            yield TarMember(name, start, size, f"{name!r} is of type {kind!r}; only files may be in a shard")
        overrides = {}


def _behind_sparse_map(stream: BinaryIO, header: bytes, start: int) -> int:
    """Where the data of a GNU sparse member begin: its map may go on for further blocks."""
    goes_on, block = header[482:483], b""
    while goes_on not in (b"\0", b""):
        stream.seek(start)
        block = stream.read(BLOCK)
        goes_on, start = block[504:505], start + BLOCK
    return start


def _check_opening(header: bytes, where: str) -> None:
    if not header:
        raise TarError(f"{where}: the file is empty")
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if header.startswith(magic):
            raise TarError(f"{where}: compressed with {name}, which cannot be read at random; decompress it first")


def _check_sum(header: bytes, where: str, position: int) -> None:
    """The header's checksum: the sum of its bytes with the checksum field taken as spaces."""
    expected = sum(header[:148]) + sum(header[156:]) + 8 * 0x20
    field = header[148:156].strip(b" \0")
    try:
        found = int(field, 8)
    except ValueError:
        found = -1
    if found != expected:
        raise TarError(f"{where}: the header at byte {position} is damaged or this is not a tar")


def _check_end(stream: BinaryIO, where: str, position: int) -> None:
    """Two zero blocks end an archive; anything but zeros after them would be lost data."""
    while chunk := stream.read(1 << 20):
        if chunk.strip(b"\0"):
            raise TarError(f"{where}: data after the end mark at byte {position}: damaged, or two tars in one file")


def _number(field: bytes, where: str, position: int) -> int:
    """Octal, or GNU's base 256 for sizes above 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0").replace(b"_", b"x") or b"0", 8)
    except ValueError:
        raise TarError(f"{where}: the header at byte {position} has no readable size") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" and header[263:265] == b"00" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _extended(stream: BinaryIO, kind: bytes, size: int, where: str) -> dict[str, str]:
    """The path and size that a GNU long name or a PAX header gives to the next member."""
    if size > MAX_LONG_HEADER_BYTES:
        raise TarError(f"{where}: an extended header of {size} bytes; more than {MAX_LONG_HEADER_BYTES} is refused")
    payload = stream.read(size)
    if kind == b"g":
        return {}
    if kind == b"L":
        return {"path": payload.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    found, rest = dict[str, str](), payload
    while rest.strip(b"\0"):
        length, _, tail = rest.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(rest):
            raise TarError(f"{where}: a PAX header that cannot be read")
        record = tail[: int(length) - len(length) - 1]
        name, _, value = record.rstrip(b"\n").partition(b"=")
        if name in (b"path", b"size"):
            found[name.decode()] = value.decode("utf-8", "surrogateescape")
        if name.startswith(b"GNU.sparse"):
            found["sparse"] = "yes"
        if name == b"GNU.sparse.name":
            found["sparse name"] = value.decode("utf-8", "surrogateescape")
        rest = rest[int(length) :]
    if "size" in found and not _OCTETS.fullmatch(found["size"]):
        raise TarError(f"{where}: a PAX header with size {found['size']!r}")
    return found
