"""A restart's lines are found again, and of two restarts the later one's lines of a batch count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.sample import Encoded, Row
from models.common.files import AppendFile
from tests.support.samples import ref
from trainer.distributed.context import DistributedContext
from trainer.ledger.blocks import block_of_lines, num_lines
from trainer.ledger.ledger import Ledger
from trainer.ledger.restarts import Restart, counting, find_step, read_restarts

ALONE = DistributedContext()


class SecondOfTwo(DistributedContext):
    """Rank 1 of 2, to whom the first rank says that this is restart `number`."""

    number = 1

    def gather(self, value: Any) -> list[Any]:
        return [self.number, value]


def row(*addresses: tuple[int, int]) -> Row:
    ids = np.zeros(1, np.int32)
    return tuple(Encoded(ref(n, slot=slot), ids, ids, np.zeros((0, 1, 1, 3), np.uint8)) for slot, n in addresses)


def restart(number: int, resumed_at: int, batches: range, world_size: int = 1) -> Restart:
    line = {"step": 1, "draws": [], "left_out": []}
    blocks = [block_of_lines([{"batch": batch, "by": number, **line} for batch in batches])] * world_size
    return Restart(number, resumed_at, world_size, lambda: iter(blocks))


def lines_of(restart: Restart) -> list[dict[str, Any]]:
    return [line for block in restart.blocks() for line in block.lines()]


def test_what_is_written_is_read_again_by_restart_batch_and_rank(tmp_path: Path) -> None:
    first = Ledger.open(tmp_path, ALONE, resumed_at=0, facts={"engine": "zero 1"})
    first.write(1, 1, [row((0, 0), (0, 1)), ()], [row((1, 0))], loss=2.5)
    first.write(2, None, [row((0, 2))], [])
    first.close()
    second = Ledger.open(tmp_path, ALONE, resumed_at=1, facts={})
    second.write(2, 2, [row((0, 2))], [])
    second.close()
    assert (first.restart, second.restart) == (1, 2)
    one, two = read_restarts(tmp_path)
    assert (one.number, one.resumed_at, one.world_size) == (1, 0, 1)
    assert lines_of(one) == [
        {"batch": 1, "step": 1, "draws": [[0, 0], [0, 1]], "left_out": [[1, 0]], "loss": 2.5},
        {"batch": 2, "step": None, "draws": [[0, 2]], "left_out": []},
    ]
    assert (two.number, two.resumed_at, [line["batch"] for line in lines_of(two)]) == (2, 1, [2])
    assert find_step([one, two], 2) == (2, lines_of(two))
    assert find_step([one, two], 1) == (1, lines_of(one)[:1])
    assert find_step([one, two], 3) is None


def test_names_on_disk_stay(tmp_path: Path) -> None:
    Ledger.open(tmp_path, ALONE, resumed_at=7, facts={"engine": "zero 3"}).write(8, 8, [], [])
    head = json.loads((tmp_path / "attempt_0001" / "attempt.json").read_text())
    assert head.keys() == {"resumed_at", "world_size", "host", "started", "engine"}
    assert (tmp_path / "attempt_0001" / "rank_00000.blocks").is_file()


def test_opening_writes_no_line_and_only_the_first_rank_makes_the_head(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, SecondOfTwo(1, 2), resumed_at=0, facts={})
    assert list(tmp_path.iterdir()) == []
    ledger.write(1, 1, [], [])
    assert not list(tmp_path.rglob("rank_*")), "a rank's lines wait for the next checkpoint"
    ledger.sync()
    assert [path.name for path in tmp_path.rglob("rank_*")] == ["rank_00001.blocks"]
    assert read_restarts(tmp_path) == []  # it has no head, as where the first rank was killed before it wrote one


@pytest.mark.parametrize("cut", [1, 8, 27, 28, 40])
def test_a_block_that_was_broken_off_in_writing_is_left_out(tmp_path: Path, cut: int) -> None:
    ledger = Ledger.open(tmp_path, ALONE, resumed_at=0, facts={})
    ledger.write(1, 1, [row((0, 0))], [])
    (file,) = tmp_path.rglob("rank_*")
    whole = len(file.read_bytes())
    ledger.write(2, 2, [row((0, 1))], [])
    ledger.close()
    assert num_lines(file) == 2
    file.write_bytes(file.read_bytes()[: whole + cut])
    assert [line["batch"] for line in lines_of(read_restarts(tmp_path)[0])] == [1]
    spoilt = bytearray(file.read_bytes())
    spoilt[whole - 1] ^= 1
    file.write_bytes(spoilt)
    assert lines_of(read_restarts(tmp_path)[0]) == []


def test_lines_wait_until_a_checkpoint_or_for_a_while(tmp_path: Path) -> None:
    now_s = [0.0]
    file = tmp_path / "rank_00001.blocks"
    ledger = Ledger(AppendFile(file), 1, waits=True, clock=lambda: now_s[0])
    for batch in range(1, 100):
        ledger.write(batch, batch, [row((0, batch))], [])
    assert not file.exists()
    now_s[0] = 400.0
    ledger.write(100, 100, [row((0, 100))], [])
    assert num_lines(file) == 100
    ledger.write(101, 101, [row((0, 101))], [])
    ledger.close()
    assert num_lines(file) == 101
    assert file.stat().st_size < 500, "draws that follow each other are a run"


def test_draws_in_any_order_come_back_in_that_order() -> None:
    """Packing takes a slot's samples out of turn, and a row may have several."""
    generator = np.random.default_rng(0)
    lines = []
    for batch in range(1, 60):
        draws = generator.integers(0, 1 << int(generator.integers(1, 40)), (int(generator.integers(0, 9)), 2)).tolist()
        cut = int(generator.integers(0, len(draws) + 1))
        step = None if batch % 7 == 0 else batch * 1000
        lines.append({"batch": batch, "step": step, "draws": draws[:cut], "left_out": draws[cut:], "loss": batch / 3})
    block = block_of_lines(lines)
    assert list(block.lines()) == lines
    assert list(block_of_lines(list(block.lines())).lines()) == lines


@pytest.mark.parametrize(
    ("restarts", "writers"),
    [
        ([restart(1, 0, range(1, 4))], {1: 1, 2: 1, 3: 1}),
        ([restart(1, 0, range(1, 6)), restart(2, 3, range(4, 8))], {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2}),
        ([restart(1, 0, range(1, 6)), restart(2, 3, range(4, 5))], {1: 1, 2: 1, 3: 1, 4: 2}),
        ([restart(1, 0, range(1, 6)), restart(2, 3, range(0)), restart(3, 2, range(3, 4))], {1: 1, 2: 1, 3: 3}),
    ],
    ids=["one", "goes further", "gets less far", "did nothing"],
)
def test_a_restart_supersedes_what_lies_beyond_the_batch_it_goes_on_after(
    restarts: list[Restart], writers: dict[int, int]
) -> None:
    found = {}
    for each in counting(restarts):
        for line in lines_of(each.restart):
            if each.first < line["batch"] <= each.last:
                found[line["batch"]] = line["by"]
    assert found == writers
