"""Writing so that a reader sees the old thing or the new one, never a half. Loads without torch."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.errors import InputError


def sync(path: Path) -> None:
    """Push a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: Any) -> None:
    """Write indented JSON under a temporary name beside `file`, then rename; it is on the disk on return."""
    text = json.dumps(value, indent=1) + "\n"
    temporary = file.with_name(f".{file.name}.tmp")
    with _naming(file):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.rename(file)
        sync(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write under a temporary name beside `file`, then rename: whole for any reader, but not forced to the disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    with _naming(file):
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What the disk refuses in the middle of a write comes without the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def append_line(file: Path, value: Any) -> None:
    """Append one line of JSON and push it to the disk; a line that was broken off before it stays apart."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


class LineFile:
    """A file of JSON lines that is only appended to, from any thread.

    It is made with its first line. On a full disk lines wait in memory until there is space again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting = b""
        self._lock = threading.Lock()

    def write(self, value: Any) -> None:
        """Append a line, as soon as the disk takes it."""
        with self._lock:
            self._waiting += json.dumps(value).encode() + b"\n"
        with suppress(OSError):
            self._flush()

    def sync(self) -> None:
        """Push every line to the disk; OSError where it does not take them."""
        self._flush()
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Write what the disk takes, and close."""
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


def read_lines(file: Path) -> list[Any]:
    """The values of a file of JSON lines; lines that were broken off in writing are left out."""
    if not file.is_file():
        return []
    values = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


@contextmanager
def new_directory(out: Path, *, replace: bool = True) -> Iterator[Path]:
    """A hidden sibling of `out` to fill; it becomes `out` if the block ends well and is removed if it does not.

    With `replace`, an `out` that exists goes only when the new one is whole; without, one that holds anything is an
    InputError.
    """
    if not replace and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is there already: remove it or name another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file stands there; name another directory")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
