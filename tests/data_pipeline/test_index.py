"""Tars are read as webdataset reads them, damage is found, and size costs nothing at opening."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.tar_bytes import DamagedSampleError
from models.common.errors import InputError
from tests.support.paths import data, needs_data
from tests.support.shards import write_set
from tools.dev.bench.index import measure_opening, write_synthetic


def test_reads_what_webdataset_reads(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", [7, 1, 13])
    paths = [str(tmp_path / "set" / name) for name in index.shard_names]
    theirs = list(wds.WebDataset(paths, shardshuffle=False))
    assert len(theirs) == len(index) == 21
    for number, sample in enumerate(theirs):
        assert index.key_of(number) == sample["__key__"]
        files = index.read(number)
        assert files == {name: value for name, value in sample.items() if not name.startswith("__")}


def test_knows_the_size_of_images_and_pickles(tmp_path: Path) -> None:
    index = pickle.loads(pickle.dumps(write_set(tmp_path / "set", [2])))
    image = next(member for member in index.entry(1).members if member.extension == "png")
    assert (image.width, image.height) == (20, 16)


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first, same = write_set(tmp_path / "a", [3, 2]), write_set(tmp_path / "b", [3, 2])
    other = write_set(tmp_path / "c", [3, 3])
    assert first.fingerprint == same.fingerprint != other.fingerprint


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
        ShardIndex.open(tmp_path).read(2)
    path.unlink()
    with pytest.raises(DamagedSampleError, match="cannot be opened"):
        ShardIndex.open(tmp_path).read(0)


@needs_data
def test_real_tars_are_read_or_refused_with_the_reason(tmp_path: Path) -> None:
    outcomes: dict[str, int | str] = {}
    for path in sorted(data("shards").rglob("*.t*")):
        folder = tmp_path / path.name
        folder.mkdir()
        (folder / "a.tar").symlink_to(path)
        try:
            build_index(folder)
            outcomes[path.name] = len(ShardIndex.open(folder))
        except InputError as error:
            outcomes[path.name] = str(error).split(": ", 1)[1]
    assert isinstance(outcomes["image1.tar"], int)
    assert "gzip" in str(outcomes["sample.tgz"])
    assert all(outcome if isinstance(outcome, str) else outcome > 0 for outcome in outcomes.values())


def test_opening_without_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tools\.shards make"):
        ShardIndex.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"tools\.shards index"):
        ShardIndex.open(tmp_path)
    write_set(tmp_path, [2])
    (tmp_path / "index" / "members.npy").unlink()
    with pytest.raises(InputError, match="members"):
        ShardIndex.open(tmp_path)


@pytest.mark.slow
def test_ten_million_samples_open_at_once(tmp_path: Path) -> None:
    write_synthetic(tmp_path)
    opening = measure_opening(tmp_path)
    assert opening.cpu_s < 1
    assert opening.memory_bytes < 1_000_000_000
    assert opening.disk_bytes < 1_000_000_000
