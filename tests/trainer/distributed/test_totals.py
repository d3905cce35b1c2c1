"""Named totals go through one vector and come back as they were."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from trainer.distributed.context import DistributedContext
from trainer.distributed.totals import Totals


@dataclass(frozen=True)
class Inner:
    tokens: float
    targets: float


@dataclass(frozen=True)
class Outer(Totals):
    loss: float
    inner: Inner
    norms: tuple[float, ...]
    stops: float = 0.0


VALUE = Outer(1.5, Inner(2.0, 3.0), (4.0, 5.0), True)


class Doubling(DistributedContext):
    """Two ranks that hold the same."""

    def sum(self, values: object) -> list[float]:
        return [2 * value for value in values]  # type: ignore[attr-defined]


def test_a_value_is_packed_in_the_order_of_its_fields_and_unpacked_again() -> None:
    assert VALUE.pack() == [1.5, 2.0, 3.0, 4.0, 5.0, 1.0]
    assert VALUE.unpack(VALUE.pack()) == VALUE


def test_a_sum_over_ranks_keeps_every_name() -> None:
    assert VALUE.summed(Doubling()) == Outer(3.0, Inner(4.0, 6.0), (8.0, 10.0), 2.0)
    assert VALUE.summed(DistributedContext()) == VALUE


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 numbers are too few for a Outer"):
        VALUE.unpack(VALUE.pack()[:-1])
    with pytest.raises(ValueError, match="7 numbers are too many for a Outer"):
        VALUE.unpack([*VALUE.pack(), 1.0])
