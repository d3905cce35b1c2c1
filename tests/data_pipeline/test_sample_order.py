"""A draw is resolved to one sample, the same wherever it is asked for, and an order knows its own states."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.build import build_order
from data_pipeline.config import SourceConfig
from data_pipeline.sample import SampleRef
from data_pipeline.sample_order import OrderIdentity, SampleOrder
from models.common.errors import InputError
from tests.support.shards import write_set
from tests.support.streams import config


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> SampleOrder:
    """Two sources of 7 + 3 and 4 samples, 3 slots."""
    folder = tmp_path_factory.mktemp("sets")
    indexes = [write_set(folder / "a", [7, 3]), write_set(folder / "b", [4])]
    return build_order(config(folder / "a", folder / "b"), indexes, seed=5, num_slots=3)


def test_a_reference_names_the_sample_that_the_plan_says(order: SampleOrder) -> None:
    for slot in range(3):
        for n in range(12):
            ref = order.resolve(slot, n)
            source, sample = order.plan.locate(slot, n)
            index = order.indexes[source]
            names = (index.shard_of(sample), index.key_of(sample))
            assert ref == SampleRef(slot, n, source, sample, *names)
            assert ref.key == f"{sample:06d}"


def test_an_epoch_names_every_sample_once(order: SampleOrder) -> None:
    for epoch in range(2):
        refs = [
            order.resolve(slot, epoch * order.slot_length(slot) + n)
            for slot in range(3)
            for n in range(order.slot_length(slot))
        ]
        assert sorted((ref.source, ref.sample) for ref in refs) == [(0, n) for n in range(10)] + [
            (1, n) for n in range(4)
        ]
        assert {order.epoch_of(ref.slot, ref.n) for ref in refs} == {epoch}
    assert order.epoch_samples == 14


def test_the_key_of_a_selected_tar_is_that_of_its_own_samples(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [7, 3])
    from data_pipeline.source import open_index

    source = SourceConfig(path=f"{tmp_path}/a/shard-{{000001..000001}}.tar")
    found = build_order(config(source), [open_index(source)], seed=5, num_slots=1)
    assert sorted(found.resolve(0, n).key for n in range(3)) == ["000007", "000008", "000009"]


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "other"), ("seed", 6), ("num_slots", 4)])
def test_a_state_of_another_order_is_refused(order: SampleOrder, name: str, value: object) -> None:
    state = order.identity._asdict()
    order.identity.check(state)
    assert OrderIdentity.of_state(state) == order.identity
    with pytest.raises(InputError, match=name):
        order.identity.check(state | {name: value})


def test_samples_are_numbered_over_all_sources(order: SampleOrder) -> None:
    assert order.num_samples == 14
    numbers = [order.sample_numbers(slot, 0, order.slot_length(slot)).tolist() for slot in range(3)]
    assert sorted(number for each in numbers for number in each) == list(range(14))
    for n, number in enumerate(order.sample_numbers(1, 2, 9).tolist(), start=2):
        ref = order.resolve(1, n)
        assert number == ref.sample + (10 if ref.source else 0)
