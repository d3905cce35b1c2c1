"""Tars that are broken before they are indexed: what is sound is indexed, the rest named, too much is an error."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import QUARANTINE_FILE, ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.tar import read_members
from models.common.errors import InputError, run_cli
from tests.data_pipeline.test_bad_input import open_epoch
from tests.support.shards import caption_sample, write_set, write_tar
from tests.support.streams import keys_left
from tools.shards.__main__ import main

KEYS = [f"{n:06d}" for n in range(4)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, dict[str, bytes]], list[int]]:
    """A tar of four samples, its files by key, and the byte at which each sample's first header lies."""
    path = write_tar(tmp_path_factory.mktemp("whole") / "a.tar", [(key, caption_sample(int(key))) for key in KEYS])
    starts = [member.offset - 512 for member in read_members(path)][::2]
    return path.read_bytes(), {key: caption_sample(int(key)) for key in KEYS}, starts


def index_of(folder: Path, content: bytes) -> tuple[dict[str, dict[str, bytes]], list[dict[str, str]]]:
    """What is indexed of a tar, and what is named; a sound tar beside it carries the set."""
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(content)
    if not (folder / "b.tar").exists():
        write_tar(folder / "b.tar", [("other", caption_sample(9))])
    build_index(folder, bad_share_limit=0.9)
    index = ShardIndex.open(folder)
    found = {index.key_of(n): index.read(n) for n in range(len(index))}
    assert found.pop("other") == caption_sample(9)
    return found, index.left_out()


def test_cut_at_every_block_and_at_random(
    whole: tuple[bytes, dict[str, dict[str, bytes]], list[int]], tmp_path: Path
) -> None:
    content, files, starts = whole
    end = len(content.rstrip(b"\0"))
    random = np.random.default_rng(0).integers(0, end, 30)
    for length in [*range(0, end, 512), *map(int, random)]:
        found, (named,) = index_of(tmp_path / "set", content[:length])
        begun = [key for key, start in zip(KEYS, starts, strict=True) if start + 512 <= length]
        assert list(found) == begun[: len(found)], length
        assert len(found) >= len(begun) - 1  # at most the sample at the cut, of which members may be lost, is left out
        assert all(found[key] == files[key] for key in found)
        assert named["shard"] == "a.tar"
        assert named["key"] in {"", *begun}
        assert "cut short" in named["reason"] or "empty" in named["reason"]


def test_flipped_header_bytes(whole: tuple[bytes, dict[str, dict[str, bytes]], list[int]], tmp_path: Path) -> None:
    content, files, starts = whole
    for number, start in enumerate(starts):
        for place in map(int, np.random.default_rng(number).integers(start, start + 345, 12)):
            flipped = content[:place] + bytes([content[place] ^ 0x21]) + content[place + 1 :]
            found, (named,) = index_of(tmp_path / "set", flipped)
            assert list(found) == KEYS[: max(0, number - 1)], place
            assert all(found[key] == files[key] for key in found)
            assert (named["shard"], named["key"]) == ("a.tar", KEYS[number - 1] if number else "")
            assert f"the header at byte {start} is damaged" in named["reason"]


def odd_tar(name: str, *, kind: bytes = tarfile.REGTYPE, comment: str = "", first: str = "good.txt") -> bytes:
    """A tar of a sound sample and one odd member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, odd in ((first, False), (name, True), ("last.txt", False)):
            info = tarfile.TarInfo(member)
            info.size = 4
            if odd:
                info.type, info.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
                info.pax_headers = {"comment": comment} if comment else {}
                info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"text"))
    return stream.getvalue()


CASES: dict[str, tuple[Callable[[bytes], bytes], list[str], str, str]] = {
    # what becomes of a sound tar, keys that stay, the key that is named, the reason
    "up": (lambda _: odd_tar("../x.txt"), ["good", "last"], "../x", "names must stay inside"),
    "root": (lambda _: odd_tar("/x.txt"), ["good", "last"], "/x", "names must stay inside"),
    "twice": (lambda _: odd_tar("good.txt"), ["last"], "good", "comes twice"),
    "apart": (lambda _: odd_tar("x.txt", first="last.txt"), ["last", "x"], "last", "comes twice in the tar"),
    "link": (lambda _: odd_tar("x.txt", kind=tarfile.SYMTYPE), ["good", "last"], "x", "only files"),
    "pipe": (lambda _: odd_tar("x.txt", kind=tarfile.FIFOTYPE), ["good", "last"], "x", "only files"),
    "bomb": (lambda _: odd_tar("x.txt", comment="x" * 1_000_000), [], "good", "extended header of"),
    "gzip": (gzip.compress, [], "", "compressed with gzip"),
    "empty file": (lambda _: b"", [], "", "the file is empty"),
    "empty tar": (lambda _: bytes(10_240), [], "", "holds no samples"),
    "no tar": (lambda _: b"not a tar" * 100, [], "", "not a tar"),
    "two tars": (lambda content: content + content, KEYS[:-1], KEYS[-1], "data after the end mark"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_is_named_with_shard_key_and_reason(
    name: str, whole: tuple[bytes, dict[str, dict[str, bytes]], list[int]], tmp_path: Path
) -> None:
    change, stay, key, reason = CASES[name]
    found, (named,) = index_of(tmp_path / "set", change(whole[0]))
    assert sorted(found) == stay
    assert (named["shard"], named["key"]) == ("a.tar", key)
    assert reason in named["reason"]


def test_one_broken_tar_of_many_stops_nothing_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    write_set(folder, [2] * 30)
    assert not (folder / QUARANTINE_FILE).exists()
    broken = folder / "shard-000007.tar"
    broken.write_bytes(broken.read_bytes()[:3000])
    assert run_cli(main, ["index", str(folder), "--quiet", "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "in 30 shards" in said.out
    assert "WARNING: 1 samples or ends of tars, in 1 tars" in said.err
    assert run_cli(main, ["check", str(folder), "--quiet", "--jobs", "1"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("shard-000007.tar\t000014\tcut short")
    assert "0 of 58 samples are broken; 1 more were left out" in said.err
    seen = keys_left(open_epoch(folder, tmp_path / "q.jsonl"))
    assert sorted(seen) == [f"{n:06d}" for n in range(60) if n not in (14, 15)]
    assert run_cli(main, ["index", str(folder), "--quiet", "--jobs", "1", "--bad-share-limit", "0.01"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 30 tars break off or hold nothing, 1 samples cannot be used; more than 1%" in line
    assert "shard-000007.tar 000014: cut short" in line
    write_set(folder, [2] * 30)  # mended: the list goes
    assert not (folder / QUARANTINE_FILE).exists()


def test_many_broken_samples_are_an_error_and_all_are_listed(tmp_path: Path) -> None:
    samples = [(f"{n % 12}", caption_sample(n)) for n in range(24)]
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(InputError, match=r"12 samples cannot be used; more than 5%; the first: a\.tar 0: the key '0'"):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()
    lines = [json.loads(line) for line in (tmp_path / QUARANTINE_FILE).read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{n}" for n in range(12)]


def test_a_flipped_header_byte_is_found_while_indexing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}", caption_sample(n)) for n in range(3)])
    whole = path.read_bytes()
    offsets = [member.offset - 512 for member in read_members(path)]
    for place in (offsets[1] + 3, offsets[2] + 125, offsets[3] + 150, offsets[1] + 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"damaged|cut short"):
            build_index(tmp_path)
    assert not (tmp_path / "index").exists()


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
