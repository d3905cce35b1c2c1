"""Whatever happens to a shard after it was indexed: each lost sample is named, all others are seen, none is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import ShardIndex
from tests.support.shards import write_set
from tests.support.streams import config, keys_left, open_rank

NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, bytes]:
    folder = tmp_path_factory.mktemp("damage")
    index = write_set(folder, [NUM_SAMPLES])
    return index, (folder / index.shard_names[0]).read_bytes()


def seen_and_named(index: ShardIndex, quarantine: Path) -> tuple[list[str], list[str]]:
    """Keys that an epoch gives, and keys that it names as bad."""
    data = config(index.folder, bad_share_limit=1.0)
    seen = keys_left(open_rank(data, num_slots=1, quarantine=quarantine))
    lines = quarantine.read_text().splitlines() if quarantine.exists() else []
    return sorted(seen), sorted(json.loads(line)["key"] for line in lines)


def intact(index: ShardIndex, changed: range) -> list[str]:
    """Keys of the samples none of whose bytes lie in `changed`."""
    entries = [index.entry(n) for n in range(len(index))]
    return [
        entry.key
        for entry in entries
        if all(m.offset + m.size <= changed.start or m.offset >= changed.stop for m in entry.members)
    ]


def assert_accounted(index: ShardIndex, changed: range, quarantine: Path) -> None:
    seen, named = seen_and_named(index, quarantine)
    assert seen == intact(index, changed)
    assert sorted(seen + named) == [f"{n:06d}" for n in range(NUM_SAMPLES)]


def test_cut_at_every_block_and_at_random(whole: tuple[ShardIndex, bytes], tmp_path: Path) -> None:
    index, content = whole
    path = index.folder / index.shard_names[0]
    random = np.random.default_rng(0).integers(0, len(content), 20)
    for length in [*range(0, len(content), 512), *map(int, random)]:
        path.write_bytes(content[:length])
        assert_accounted(index, range(length, len(content)), tmp_path / f"{length}.jsonl")
    path.write_bytes(content)


def test_bytes_flipped_at_random(whole: tuple[ShardIndex, bytes], tmp_path: Path) -> None:
    """A flip in a header or in padding harms nobody: members are found by the index, not by headers."""
    index, content = whole
    path = index.folder / index.shard_names[0]
    for place in map(int, np.random.default_rng(1).integers(0, len(content), 60)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        assert_accounted(index, range(place, place + 1), tmp_path / f"{place}.jsonl")
    path.write_bytes(content)


def test_a_shard_that_is_gone(whole: tuple[ShardIndex, bytes], tmp_path: Path) -> None:
    index, content = whole
    path = index.folder / index.shard_names[0]
    path.unlink()
    fresh = ShardIndex.open(index.folder)
    assert_accounted(fresh, range(len(content)), tmp_path / "gone.jsonl")
    path.write_bytes(content)
