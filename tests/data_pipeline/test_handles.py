"""Tars stay open for as many slots as a rank has, and an index of a billion samples opens at once."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path

import pytest

from data_pipeline.build import num_open_shards
from data_pipeline.index import ShardIndex
from tests.support.shards import write_set
from tools.dev.bench.index import measure_opening, write_synthetic
from tools.dev.bench.scale.cost import in_child
from tools.dev.bench.scale.reading import reads_of


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Of 300 tars."""
    return write_set(tmp_path_factory.mktemp("wide"), [1] * 300)


@pytest.mark.parametrize("num_slots", [8, 64, 256, 1024])
def test_fewer_than_one_read_in_a_hundred_opens_a_file(tmp_path: Path, num_slots: int) -> None:
    found = in_child(lambda: reads_of(tmp_path, num_slots, num_draws=128))
    assert found.opens / found.num_reads < 0.01
    assert found.handles <= 2 * num_slots


def test_the_tar_that_was_read_longest_ago_is_closed_first(wide: ShardIndex) -> None:
    index = ShardIndex.open(wide.folder)
    for _ in range(3):
        for sample in range(80):
            index.read(0)
            index.read(sample)
    assert len(index.tars.files) == 64
    assert index.shard_names[0] in index.tars.files


def test_a_copy_in_a_worker_keeps_as_many(wide: ShardIndex) -> None:
    index = ShardIndex.open(wide.folder)
    index.read_at_once(200)
    copied = pickle.loads(pickle.dumps(index))
    for each in (index, copied):
        for sample in range(300):
            each.read(sample)
        assert len(each.tars.files) == 200


def test_no_more_than_the_system_lets_a_process_open(wide: ShardIndex) -> None:
    def read_all() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
        index = ShardIndex.open(wide.folder)
        index.read_at_once(10_000)
        for sample in range(300):
            index.read(sample)
        return len(index.tars.files)

    assert in_child(read_all) == 400 - 256


def test_slots_and_windows_say_how_many_tars_are_read_at_once(wide: ShardIndex) -> None:
    assert num_open_shards(wide, 4, 10) == 44
    assert num_open_shards(wide, 1024, 4096) == 300


@pytest.mark.slow
def test_a_billion_samples_in_a_hundred_thousand_tars_open_in_a_second(tmp_path: Path) -> None:
    write_synthetic(tmp_path, 1_000_000_000, per_shard=10_000)
    opening = measure_opening(tmp_path)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "index").iterdir()) < 1e8, "the arrays are sparse"
    assert opening.cpu_s < 2.0, "a second on a machine that does nothing else"
    assert opening.memory_bytes < 200_000_000
