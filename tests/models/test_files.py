"""Files that are complete or absent, and lines that wait for space."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.common.errors import InputError
from models.common.files import (
    LineFile,
    create,
    locked,
    new_directory,
    new_file,
    read_lines,
    touch,
    write_bytes,
    write_json,
    write_text,
)


def test_lines_wait_for_space_and_none_is_lost_or_broken(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "new" / "lines.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # from here on the system refuses to write
    try:
        for number in range(20):
            file.write({"number": number})
        with pytest.raises(OSError, match="File too large"):
            file.sync()
        assert (tmp_path / "new/lines.jsonl").stat().st_size == 100
        assert [line["number"] for line in read_lines(tmp_path / "new/lines.jsonl")] == list(range(7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.sync()
    file.close()
    assert [line["number"] for line in read_lines(tmp_path / "new/lines.jsonl")] == list(range(20))


def refuse(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL])
def test_a_file_is_made_once_whether_the_file_system_has_hard_links_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    if number is not None:
        monkeypatch.setattr(os, "link", refuse(number))
    create(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        create(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_two_threads_may_write_one_file_at_once(tmp_path: Path) -> None:
    with new_file(tmp_path / "a") as first, new_file(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"  # the one that ended last
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the server has made the link, and the client is told of an error."""
    link = os.link

    def lose_the_answer(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", lose_the_answer)
    create(tmp_path / "a", b"first")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_what_a_file_system_does_not_offer_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    monkeypatch.setattr(os, "utime", refuse(errno.EPERM))  # another user's file
    with locked(tmp_path / ".lock"):
        touch(tmp_path / ".lock")
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write_json(tmp_path / "a.json", 1)
    with new_directory(tmp_path / "directory") as temporary:
        (temporary / "b").write_text("b")
    assert (tmp_path / "directory/b").read_text() == "b"
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):  # of a file's bytes nobody may be told that they are there
        write_json(tmp_path / "a.json", 2)


def test_without_a_line_there_is_no_file(tmp_path: Path) -> None:
    LineFile(tmp_path / "never").close()
    assert not any(tmp_path.iterdir())


def test_a_value_replaces_the_old_one_at_once_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert (tmp_path / "value.json").read_text().strip().replace(" ", "").replace("\n", "") == '{"a":1}'
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """Here no file may be longer: the system refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("durable", [False, True])
def test_a_disk_that_refuses_leaves_the_old_file_and_is_told_with_its_name(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "page.html"
    write_text(file, "old", durable=durable)
    with small_disk(100), pytest.raises(OSError, match=r"page\.html") as caught:
        write_bytes(file, b"x" * 200, durable=durable)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_is_no_fault_of_the_disk_keeps_its_own_words(tmp_path: Path) -> None:
    """A block that fetches its bytes: the file did not cause the error."""

    def fetch(file: Path) -> None:
        with new_file(file) as temporary:
            temporary.write_bytes(b"half")
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionError) as caught:
        fetch(tmp_path / "tar")
    assert caught.value.filename is None
    assert not any(tmp_path.iterdir())


def test_one_file_written_by_two_at_once_is_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "index"
    with new_file(file) as ours:
        monkeypatch.setattr(os, "getpid", lambda: 1)  # stands for another process
        with new_file(file) as theirs:
            ours.write_text("ours")
            theirs.write_text("theirs")
        assert file.read_text() == "theirs"
    assert file.read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_directory_is_whole_or_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with new_directory(out) as temporary:
        (temporary / "a").write_text("old")

    def break_off() -> None:
        with new_directory(out) as temporary:
            (temporary / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert (out / "a").read_text() == "old"
    with pytest.raises(InputError, match="is there already"), new_directory(out, replace=False):
        pass
    with new_directory(out, is_shared=True) as temporary:
        (temporary / "b").write_text("new")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
