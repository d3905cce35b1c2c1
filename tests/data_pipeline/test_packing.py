"""Rows are filled well, nothing is lost, and every sample gets its turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import GroupPacking, PadPacking, RowPacking
from data_pipeline.packing import Packer, best_filling
from data_pipeline.sample import Encoded, Row
from tests.support.samples import ref

NO_TILES = np.zeros((0, 1, 1, 3), dtype=np.uint8)


def source(lengths: list[int]) -> Callable[[], Encoded | None]:
    def samples() -> Iterator[Encoded]:
        for n, length in enumerate(lengths):
            ids = np.zeros(length, dtype=np.int32)
            yield Encoded(ref(n), ids, ids, NO_TILES)

    iterator = samples()
    return lambda: next(iterator, None)


def rows(packing: PadPacking | RowPacking | GroupPacking, lengths: list[int]) -> list[Row]:
    packer, draw_next = Packer(packing), source(lengths)
    found = []
    while row := packer.next_row(draw_next):
        found.append(row)
    return found


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=40), lookahead=st.integers(1, 9))
def test_every_sample_once_and_no_row_too_long(lengths: list[int], lookahead: int) -> None:
    found = rows(RowPacking(row_tokens=50, lookahead=lookahead), lengths)
    assert sorted(sample.ref.n for row in found for sample in row) == list(range(len(lengths)))
    assert all(sum(sample.num_tokens for sample in row) <= 50 for row in found)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_no_sample_waits_longer_than_the_lookahead(lengths: list[int]) -> None:
    """The oldest always opens the next row, so at most `lookahead` rows pass by a waiting sample."""
    found = rows(RowPacking(row_tokens=50, lookahead=4), lengths)
    placed = {sample.ref.n: place for place, row in enumerate(found) for sample in row}
    for n, place in placed.items():
        later = [other for other, where in placed.items() if other > n and where < place]
        assert len({placed[other] for other in later}) <= 4


def test_pad_puts_one_sample_in_a_row() -> None:
    assert [len(row) for row in rows(PadPacking(), [3, 4, 5])] == [1, 1, 1]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=40), lookahead=st.integers(1, 9))
def test_a_group_lets_every_sample_go_within_its_lookahead(lengths: list[int], lookahead: int) -> None:
    found = [row[0].ref.n for row in rows(GroupPacking(lookahead=lookahead), lengths)]
    assert sorted(found) == list(range(len(lengths)))
    assert all(n // lookahead == place // lookahead for place, n in enumerate(found))


def padding_share(packing: PadPacking | GroupPacking, lengths: list[int], num_slots: int) -> float:
    """Share of positions that are padding, where each step pads its rows to the longest of them."""
    each = len(lengths) // num_slots
    slots = [rows(packing, lengths[slot * each : (slot + 1) * each]) for slot in range(num_slots)]
    steps = [[sum(sample.num_tokens for sample in row) for row in step] for step in zip(*slots, strict=True)]
    return 1 - sum(map(sum, steps)) / sum(max(step) * len(step) for step in steps)


def test_groups_save_padding() -> None:
    lengths = llava_like_lengths(16_000)
    shares = [padding_share(packing, lengths, 16) for packing in (PadPacking(), GroupPacking(lookahead=16))]
    assert shares[1] < 0.5 * shares[0], shares


def llava_like_lengths(count: int) -> list[int]:
    """Lengths as LLaVA-1.5's mixture has them: 576 image tokens and a text with a long tail; some text only."""
    generator = np.random.default_rng(0)
    text = np.minimum(np.exp(generator.normal(5.0, 0.9, count)).astype(int) + 20, 1400)
    return (text + 576 * (generator.random(count) < 0.9)).tolist()


@pytest.mark.parametrize(("lookahead", "limit"), [(8, 0.05), (32, 0.01)])
def test_waste_is_at_most_five_percent(lookahead: int, limit: float) -> None:
    found = rows(RowPacking(row_tokens=4096, lookahead=lookahead), llava_like_lengths(20_000))
    tokens = sum(sample.num_tokens for row in found for sample in row)
    waste = 1 - tokens / (4096 * len(found))
    assert waste <= limit, waste


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=9), room=st.integers(0, 80))
def test_the_filling_is_the_best_there_is(lengths: list[int], room: int) -> None:
    chosen = best_filling(lengths, room)
    sums = [sum(part) for size in range(len(lengths) + 1) for part in itertools.combinations(lengths, size)]
    assert sum(lengths[place] for place in chosen) == max(total for total in sums if total <= room)
    assert chosen == sorted(set(chosen))
