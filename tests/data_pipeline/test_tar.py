"""Headers are walked as `tarfile` walks sound ones, and what it would lose in silence is an error."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_pipeline.tar import BLOCK, TarError, read_members
from tests.support.shards import caption_sample, write_tar


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walks_every_tar_format_with_long_names(tmp_path: Path, form: int) -> None:
    names = ["a/" * 40 + "x.txt", "b.json", "ü" * 20 + ".jpg"] + (["c" * 120 + ".txt"] if form else [])
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for place, name in enumerate(names):
            info = tarfile.TarInfo(name)
            (tmp_path / "payload").write_bytes(b"x" * (place * 600))
            info.size = place * 600
            with (tmp_path / "payload").open("rb") as stream:
                archive.addfile(info, stream)
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [(member.name, member.offset, member.size) for member in read_members(path)] == expected


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [(f"{n}", caption_sample(n)) for n in range(3)]).read_bytes()
    cut = tmp_path / "cut.tar"
    end = len(whole.rstrip(b"\0"))
    for length in [*range(0, end, 512), *range(1, end, 997)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(TarError, match=r"cut short|empty|damaged"):
            list(read_members(cut))


def archive(path: Path, *members: tuple[str, bytes]) -> Path:
    """A plain tar of members of one byte each, by name and type."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as stream:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" if kind == tarfile.SYMTYPE else ""
            stream.addfile(info)
    return path


def test_directories_are_ignored_and_links_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", ("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("f", tarfile.REGTYPE))
    link, file = read_members(path)
    assert link.name == "l"
    assert "only files" in link.problem
    assert (file.name, file.problem) == ("f", "")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"\x1f\x8b" + bytes(600), "gzip"), (b"BZh" + bytes(600), "bzip2")]
)
def test_what_is_no_plain_tar_says_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(TarError, match=reason):
        list(read_members(tmp_path / "a.tar"))


def test_two_tars_in_one_file_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", ("f", tarfile.REGTYPE))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(TarError, match="two tars in one file"):
        list(read_members(path))


def test_sizes_beyond_octal_are_read(tmp_path: Path) -> None:
    """GNU writes sizes of 8 GiB and more in base 256; a header that claims one needs more bytes than there are."""
    info = tarfile.TarInfo("f")
    info.size = 9 * 2**30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    with pytest.raises(TarError, match=f"needs {info.size} bytes"):
        list(read_members(tmp_path / "a.tar"))


def test_a_sparse_member_is_stepped_over_and_named(tmp_path: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.txt", "GNU.sparse.realsize": "9"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, pax in (("a.txt", {}), ("GNUSparseFile.0/b.txt", headers), ("c.txt", {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 4, pax
            archive.addfile(info, io.BytesIO(b"text"))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    found = {member.name: member.problem for member in read_members(tmp_path / "a.tar")}
    assert list(found) == ["a.txt", "b.txt", "c.txt"]
    assert "is a sparse file" in found["b.txt"]
    assert not found["a.txt"] + found["c.txt"]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_of_gnu_tar_are_stepped_over(tmp_path: Path, form: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar program here")
    for name in ("a.txt", "b.txt", "c.txt"):
        with (tmp_path / name).open("wb") as stream:
            for hole in range(40 if name == "b.txt" else 1):
                stream.seek(hole * 65_536 * (name == "b.txt"))
                stream.write(b"text")
    made = subprocess.run(
        ["tar", "-S", f"--format={form}", "-cf", "x.tar", "a.txt", "b.txt", "c.txt"], cwd=tmp_path, check=False
    )
    if made.returncode:
        pytest.skip("this tar program writes no sparse files")
    members = list(read_members(tmp_path / "x.tar"))
    assert [member.name for member in members] == ["a.txt", "b.txt", "c.txt"]
    assert not members[2].problem


def test_a_size_in_other_digits_is_a_damaged_header(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 4, {"size": "\u00b2"}
        archive.addfile(info, io.BytesIO(b"text"))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    with pytest.raises(TarError, match="PAX header with size"):
        list(read_members(tmp_path / "a.tar"))
