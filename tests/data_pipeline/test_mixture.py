"""Without weights an epoch is every sample once; with weights every block of draws has its shares."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import BLOCK_DRAWS, Concatenation, Mixture, quotas
from models.common.errors import InputError


@settings(deadline=None, max_examples=20)
@given(
    sources=st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    num_slots=st.integers(1, 3),
)
def test_sources_without_weights_are_one_exact_epoch(sources: list[list[int]], num_slots: int) -> None:
    plan = Concatenation(sources, 5, num_slots, 4)
    seen = [plan.locate(slot, n) for slot in range(num_slots) for n in range(plan.slot_length(slot))]
    assert sorted(seen) == [(i, sample) for i, shards in enumerate(sources) for sample in range(sum(shards))]


def test_weights_hold_in_every_block_and_each_source_goes_round_exactly() -> None:
    plan = Mixture([[40], [500], [100, 60]], [1, 6, 3], 0, 4, 16)
    for block in (0, 1, 50):
        draws = [plan.locate(2, block * BLOCK_DRAWS + n) for n in range(BLOCK_DRAWS)]
        assert Counter(source for source, _ in draws) == {0: 100, 1: 600, 2: 300}
    small = [sample for n in range(BLOCK_DRAWS) for source, sample in [plan.locate(2, n)] if source == 0]
    assert set(Counter(small).values()) == {10}  # 10 samples of 40 are this slot's, 100 draws


def test_quotas_sum_and_leave_nobody_out() -> None:
    assert quotas([1, 1, 1], 1000).sum() == 1000
    assert quotas([1, 1e9], 1000).tolist() == [1, 999]


def test_a_source_smaller_than_the_batch_cannot_be_weighted() -> None:
    with pytest.raises(InputError, match="fewer than the 8 rows"):
        Mixture([[100], [5]], [1, 1], 0, 8, 16)


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    """Whatever was asked before: the same slots in order, backwards, and by a fresh mixture each time."""

    def fresh() -> Mixture:
        return Mixture([[40], [50, 9]], [1, 2], 7, 2, 4)

    draws = [(slot, n) for slot in range(2) for n in (0, 5, BLOCK_DRAWS - 1, BLOCK_DRAWS, 3 * BLOCK_DRAWS + 1)]
    once = fresh()
    forwards = [once.locate(*draw) for draw in draws]
    assert [once.locate(*draw) for draw in reversed(draws)] == forwards[::-1]
    assert [fresh().locate(*draw) for draw in draws] == forwards


@pytest.mark.parametrize("span", [(0, 14), (3, 9), (995, 2005), (7, 7)])
def test_many_draws_at_once_are_those_one_by_one(span: tuple[int, int]) -> None:
    plans = [Mixture([[40], [50, 9]], [1, 2], 7, 2, 4), Concatenation([[40], [], [50, 9]], 7, 2, 4)]
    for plan in plans:
        sources, samples = plan.locate_all(1, *span)
        assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == [plan.locate(1, n) for n in range(*span)]
