"""Parts that several machines make are one set in the end: the same samples in the same order, under one index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from models.common.errors import InputError
from tests.support.shards import image_bytes, write_set
from tools.shards.__main__ import main
from tools.shards.join import join_parts

NUM_PARTS, NUM_SAMPLES = 3, 11


@pytest.fixture
def raw(tmp_path: Path) -> list[str]:
    """Eleven records of LLaVA, and the words that name them."""
    records = []
    for number in range(NUM_SAMPLES):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Number {number}."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "raw.json").write_text(json.dumps(records))
    return ["--llava", str(tmp_path / "raw.json"), "--images", str(tmp_path), "--jobs", "1", "--quiet"]


def make(out: Path, raw: list[str], number: int) -> int:
    return main(["make", str(out), *raw, "--samples-per-shard", "2", "--part", f"{number}/{NUM_PARTS}"])


def contents(folder: Path) -> list[dict[str, bytes]]:
    index = ShardIndex.open(folder)
    return [index.read(number) for number in range(len(index))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order_are_the_whole(tmp_path: Path, raw: list[str], order: tuple[int, ...]) -> None:
    main(["make", str(tmp_path / "whole"), *raw])
    out = tmp_path / "out"
    for number in order:
        assert not (out / "index").exists()
        make(out, raw, number)
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["index"]
    assert len(ShardIndex.open(out).shard_names) == 2 + 2 + 2
    assert make(out, raw, 1) == 0, "a task that is started again finds the whole"
    fingerprint = ShardIndex.open(out).fingerprint
    assert build_index(out) == fingerprint, "as if its tars had been indexed"


def test_a_join_that_was_interrupted_goes_on(tmp_path: Path, raw: list[str]) -> None:
    out = tmp_path / "out"
    for number in range(NUM_PARTS - 1):
        make(out, raw, number)
    assert not join_parts(out, NUM_PARTS)
    shutil.copytree(out, tmp_path / "copy")
    make(out, raw, NUM_PARTS - 1)
    expected = contents(out)
    half = tmp_path / "copy"
    (half / "part-0000" / "shard-000000.tar").rename(half / "part-0000-shard-000000.tar")
    make(half, raw, NUM_PARTS - 1)
    assert contents(half) == expected


def test_what_is_missing_is_named(tmp_path: Path, raw: list[str]) -> None:
    out = tmp_path / "out"
    make(out, raw, 0)
    with pytest.raises(InputError, match="some of the 3 parts are not there yet"):
        main(["join", str(out), "--parts", "3"])
    next((out / "part-0000").glob("*.tar")).unlink()
    make(out, raw, 1)
    with pytest.raises(InputError, match=r"not there as its index says; remove .*part-0000"):
        make(out, raw, 2)


def test_parts_with_other_members_and_left_out_samples_are_joined(tmp_path: Path) -> None:
    """One part has images, the other none; a part made by `index` may have left samples out."""
    write_set(tmp_path / "part-0000", [2, 1])
    write_set(tmp_path / "part-0001", [3], image=False)
    (tmp_path / "part-0001" / "quarantine.jsonl").write_text(
        '{"shard": "shard-000000.tar", "key": "x", "reason": "y"}\n'
    )
    expected = [*contents(tmp_path / "part-0000"), *contents(tmp_path / "part-0001")]
    assert join_parts(tmp_path, 2)
    assert contents(tmp_path) == expected
    assert ShardIndex.open(tmp_path).left_out() == [{"shard": "part-0001-shard-000000.tar", "key": "x", "reason": "y"}]
