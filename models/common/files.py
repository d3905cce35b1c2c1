"""Atomic writes of files and directories, and files of JSON lines. Loads without torch.

    new_file, write_text, write_bytes, write_json    a hidden sibling is written, then renamed
    new_directory                                    the same for a directory
    append_line, LineFile, read_lines, each_line     JSON lines, of which the last may be incomplete
    is_inside                                        whether a name leads out of its folder
    create, locked, touch, sync                      what not every file system offers: done without, where that is safe

`durable` means that the data is on the disk on return, so it survives a power cut; without it a reader still never sees
half a file. Every fsync waits for the disk, so it is only for files that a run resumes from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from models.common.documents import check, parse
from models.common.errors import DISK_FAULTS, InputError

_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK)
"""How file systems say that they lack an operation: what needs it does without, where that is safe."""


def sync(path: Path) -> None:
    """Push a file's bytes, or a directory's entries, to the disk (fsync).

    Some file systems (SMB, several FUSE) know no fsync of a directory; they keep its entries on their server.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in (errno.EISDIR, *_NOT_OFFERED):
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def create(file: Path, data: bytes) -> None:
    """Make a file that was not there; of several processes that try at once, on one or on many machines, one succeeds.

    A hard link appears whole. Where the file system has none (BeeGFS, FAT, Drive, several FUSE) the file is opened
    exclusively, and a reader may find it empty for a moment.

    Raises:
        FileExistsError: it is there.
        OSError: it cannot be written; with a name.
    """
    own = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        own.write_bytes(data)
        try:
            os.link(own, file)
            return
        except FileExistsError:
            raise
        except OSError:
            if own.stat().st_nlink == 2:
                return
    finally:
        own.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with _naming(file):
            os.write(descriptor, data)
            os.fsync(descriptor)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file against other processes of this machine and, where the file system carries it, of others.

    On a file system without flock (some NFS and Lustre mounts) nothing is held: what is done inside must be safe twice.
    """
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise OSError(error.errno, error.strerror, str(file)) from error
        yield


def touch(file: Path) -> None:
    """Note that a file was used; where it is another user's, its age stays what it was."""
    with suppress(PermissionError):
        os.utime(file)


def rename_durably(temporary: Path, final: Path) -> None:
    """Rename within a directory; the new name is on the disk on return."""
    temporary.rename(final)
    sync(final.parent)


@contextmanager
def new_file(file: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling of `file` to write; it becomes `file` if the block ends well and is removed if not.

    Several processes may write the same file at once: the last one to end wins.

    Raises:
        OSError: with `file` as its name where the disk is full or the write fails. An old `file` stays unchanged.
    """
    # Not by the process's number alone: its threads may write the same file, and so may another machine's process.
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with _naming(file):
            yield temporary
            if durable:
                sync(temporary)
                rename_durably(temporary, file)
            else:
                temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(file: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace a file's content atomically."""
    with new_file(file, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_text(file: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file's content with UTF-8 text, atomically."""
    write_bytes(file, text.encode(), durable=durable)


def write_json(file: Path, value: Any) -> None:
    """Replace a file's content with indented JSON, atomically; it is on the disk on return."""
    write_text(file, json.dumps(value, indent=1) + "\n", durable=True)


@contextmanager
def new_directory(out: Path, *, replace: bool = True, is_shared: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling of `out` to fill; it becomes `out` if the block ends well and is removed if not.

    Every file in it is on the disk before it gets its name.

    Args:
        replace: an existing `out` is removed once the new one is complete.
        is_shared: other processes may make the same directory at the same time. What a killed process leaves behind
            is then not removed by the next process.

    Raises:
        InputError: `out` is a file, or without `replace` a directory that is not empty.
    """
    if not replace and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is there already: remove it or name another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file stands there; name another directory")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp" if is_shared else f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        shutil.rmtree(out, ignore_errors=True)
        rename_durably(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Add the file's name to an OSError in the middle of a write: the system gives none."""
    try:
        yield
    except OSError as error:
        # Only these: a block may also read from a network, whose errors are OSErrors, too.
        if error.filename is not None or error.errno not in (*DISK_FAULTS, errno.EFBIG, errno.EIO):
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def is_inside(name: str) -> bool:
    """Whether a path that somebody else wrote stays within the folder it is relative to, by its words alone.

    Links in the folder itself are its owner's.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def append_line(file: Path, value: Any) -> None:
    """Append one line of JSON; it is on the disk on return. It begins on a new line after an incomplete one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


class AppendFile:
    """A file that is only appended to, from any thread.

    It is made with the first bytes. On a full disk they wait in memory until there is space again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting = b""
        self._lock = threading.Lock()

    def append(self, data: bytes) -> None:
        """Append bytes; on a full disk they wait in memory."""
        with self._lock:
            self._waiting += data
        with suppress(OSError):
            self._flush()

    def sync(self) -> None:
        """Push everything to the disk; raises OSError on a full disk."""
        self._flush()
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Write what waits as far as the disk has space, and close."""
        with suppress(OSError):
            self._flush()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _flush(self) -> None:
        with self._lock:
            if self._descriptor is None and self._waiting:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
            while self._waiting and self._descriptor is not None:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]


class LineFile(AppendFile):
    """A file of JSON lines; on a full disk lines wait in memory."""

    def write(self, value: Any) -> None:
        """Append a line; on a full disk it waits in memory."""
        self.append(json.dumps(value).encode() + b"\n")


def split_lines(text: str) -> list[str]:
    """The lines of a file that are not blank; line feeds alone end them.

    `str.splitlines` also cuts at U+2028, U+0085 and form feeds, which JSON strings may hold as they are.
    """
    return [line for line in text.split("\n") if line.strip()]


def read_lines(file: Path, schema: Any = None) -> list[Any]:
    """The values of a file of JSON lines; raises as `each_line` does."""
    return list(each_line(file, schema))


def each_line(file: Path, schema: Any = None) -> Iterator[Any]:
    """The values of a file of JSON lines, one at a time; lines that were not completely written are left out.

    Args:
        schema: what every value is (`models.common.documents.check`).

    Raises:
        InputError: a value is not as the schema says; with the line's number.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = parse(line, file)
            except InputError:
                continue
            yield value if schema is None else check(value, schema, f"{file}, line {number}")
