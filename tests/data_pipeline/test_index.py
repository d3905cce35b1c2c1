"""Tars are read as webdataset reads them, damage is found, and size costs nothing at opening."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.index import DamagedSampleError, ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.tar import TarError, read_members
from models.errors import InputError
from tests.support.paths import data, needs_data
from tests.support.shards import caption_sample, write_set, write_tar
from tools.bench.index import measure_opening, write_synthetic


def test_reads_what_webdataset_reads(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", [7, 1, 13])
    paths = [str(tmp_path / "set" / name) for name in index.shard_names]
    theirs = list(wds.WebDataset(paths, shardshuffle=False))
    assert len(theirs) == len(index) == 21
    for number, sample in enumerate(theirs):
        assert index.key_of(number) == sample["__key__"]
        files = index.read(number)
        assert files == {name: value for name, value in sample.items() if not name.startswith("__")}


def test_knows_the_size_of_pictures_and_pickles(tmp_path: Path) -> None:
    index = pickle.loads(pickle.dumps(write_set(tmp_path / "set", [2])))
    picture = next(member for member in index.entry(1).members if member.extension == "png")
    assert (picture.width, picture.height) == (20, 16)


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first, same = write_set(tmp_path / "a", [3, 2]), write_set(tmp_path / "b", [3, 2])
    other = write_set(tmp_path / "c", [3, 3])
    assert first.fingerprint == same.fingerprint != other.fingerprint


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


def test_a_flipped_header_byte_is_found_while_indexing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}", caption_sample(n)) for n in range(3)])
    whole = path.read_bytes()
    offsets = [member.offset - 512 for member in read_members(path)]
    for place in (offsets[1] + 3, offsets[2] + 125, offsets[3] + 150, offsets[1] + 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"damaged|cut short"):
            build_index(tmp_path)
    assert not (tmp_path / "index").exists()


def test_a_payload_changed_or_lost_after_indexing_is_found(tmp_path: Path) -> None:
    index = write_set(tmp_path, [3])
    path = tmp_path / index.shard_names[0]
    whole = path.read_bytes()
    member = index.entry(1).members[0]
    path.write_bytes(whole[: member.offset] + bytes([whole[member.offset] ^ 1]) + whole[member.offset + 1 :])
    index.read(0)
    with pytest.raises(DamagedSampleError, match="changed since"):
        index.read(1)
    path.write_bytes(whole[: index.entry(2).members[0].offset + 5])
    with pytest.raises(DamagedSampleError, match="cut short"):
        ShardIndex(tmp_path).read(2)
    path.unlink()
    with pytest.raises(DamagedSampleError, match="cannot be opened"):
        ShardIndex(tmp_path).read(0)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([("../x", {"txt": b"a"})], "stay inside"),
        ([("/x", {"txt": b"a"})], "stay inside"),
        ([("x", {"txt": b"a"}), ("y", {"txt": b"b"}), ("x", {"txt": b"c"})], "comes twice"),
        ([("x", {"txt": b"a"}), ("x", {"txt": b"c"})], "comes twice"),
        ([], "no samples"),
    ],
)
def test_names_that_no_sample_can_have(
    tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]], reason: str
) -> None:
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(InputError, match=reason):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"\x1f\x8b" + b"0" * 600, "gzip"), (b"no tar" * 200, "not a tar")]
)
def test_files_that_are_no_tar(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        build_index(tmp_path)


def test_a_pax_bomb_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"comment": "x" * 10_000_000}
        archive.addfile(info)
    with pytest.raises(InputError, match="extended header"):
        build_index(tmp_path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(InputError, match="only files"):
        build_index(tmp_path)


@needs_data
def test_real_tars_are_read_or_refused_with_the_reason(tmp_path: Path) -> None:
    outcomes: dict[str, int | str] = {}
    for path in sorted(data("shards").rglob("*.t*")):
        folder = tmp_path / path.name
        folder.mkdir()
        (folder / "a.tar").symlink_to(path)
        try:
            build_index(folder)
            outcomes[path.name] = len(ShardIndex(folder))
        except InputError as error:
            outcomes[path.name] = str(error).split(": ", 1)[1]
    assert isinstance(outcomes["image1.tar"], int)
    assert "gzip" in str(outcomes["sample.tgz"])
    assert all(outcome if isinstance(outcome, str) else outcome > 0 for outcome in outcomes.values())


def test_opening_without_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tools\.shards make"):
        ShardIndex(tmp_path / "none")
    with pytest.raises(InputError, match=r"tools\.shards index"):
        ShardIndex(tmp_path)
    write_set(tmp_path, [2])
    (tmp_path / "index" / "members.npy").unlink()
    with pytest.raises(InputError, match="members"):
        ShardIndex(tmp_path)


@pytest.mark.slow
def test_ten_million_samples_open_at_once(tmp_path: Path) -> None:
    write_synthetic(tmp_path)
    opening = measure_opening(tmp_path)
    assert opening.cpu_s < 1
    assert opening.memory_bytes < 1_000_000_000
    assert opening.disk_bytes < 1_000_000_000
