"""An epoch holds every sample once, whoever looks at it, and any draw is found at once."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order, permutation

SIZES = st.lists(st.integers(0, 13), min_size=1, max_size=7).filter(lambda sizes: sum(sizes) > 0)


@settings(deadline=None, max_examples=60)
@given(
    sizes=SIZES,
    num_slots=st.integers(1, 20),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_sample_exactly_once(
    sizes: list[int], num_slots: int, window: int, seed: int, epoch: int
) -> None:
    order = Order(sizes, seed, num_slots, window)
    seen = [
        order.sample(slot, epoch * order.slot_length(slot) + place)
        for slot in range(num_slots)
        for place in range(order.slot_length(slot))
    ]
    assert sorted(seen) == list(range(sum(sizes)))


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, num_slots=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_draw_does_not_depend_on_the_draws_before_it(sizes: list[int], num_slots: int, seed: int) -> None:
    walked, jumped = Order(sizes, seed, num_slots, 3), Order(sizes, seed, num_slots, 3)
    for slot in range(num_slots):
        length = walked.slot_length(slot)
        forward = [walked.sample(slot, n) for n in range(2 * length)]
        assert forward == [jumped.sample(slot, n) for n in reversed(range(2 * length))][::-1]


def test_epochs_and_seeds_differ() -> None:
    order, other = Order([100], 0, 1, 100), Order([100], 1, 1, 100)
    first = [order.sample(0, n) for n in range(100)]
    assert first != [order.sample(0, n) for n in range(100, 200)]
    assert first != [other.sample(0, n) for n in range(100)]


def test_permutations_never_change() -> None:
    """A resumed run relies on these numbers; they may not depend on numpy's version."""
    assert permutation(8, 7, 1, 0).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


def test_a_draw_in_the_millions_costs_what_the_first_one_costs() -> None:
    def first_draw(n: int) -> float:
        order = Order([10_000] * 1_000, 0, 8, 4096)
        start = time.thread_time()
        order.sample(3, n)
        return time.thread_time() - start

    early, late = (min(first_draw(n) for _ in range(5)) for n in (0, 1_000_000))
    assert late < 5 * early + 0.01


def test_samples_of_a_window_lie_near_each_other() -> None:
    order = Order([1000] * 20, 0, 2, 500)
    shards = {order.sample(0, n) // 1000 for n in range(500)}
    assert len(shards) <= 2


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, num_slots=st.integers(1, 5), window=st.integers(1, 9), start=st.integers(0, 20))
def test_many_draws_at_once_are_those_one_by_one(sizes: list[int], num_slots: int, window: int, start: int) -> None:
    order = Order(sizes, 3, num_slots, window)
    for slot in range(num_slots):
        if order.slot_length(slot):
            stop = start + 3 * order.slot_length(slot)
            assert order.samples(slot, start, stop).tolist() == [order.sample(slot, n) for n in range(start, stop)]
