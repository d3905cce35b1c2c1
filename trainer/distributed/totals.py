"""Sums over ranks that keep their names: a dataclass of numbers goes through one all-reduce as a float64 vector.

    Totals(loss_sum=…, counts=Counts(…), squared_norms=(…)) --pack--> [ … ] --all-reduce--> [ … ] --unpack--> Totals

All sums of a step over ranks go into one vector, since a collective costs its latency whatever its size. Fields of a
dataclass have names, positions in a vector do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from trainer.distributed.context import DistributedContext

T = TypeVar("T", bound="Totals")


class Totals:
    """Base of frozen dataclasses whose fields are numbers, tuples of numbers, or dataclasses of numbers."""

    def pack(self) -> list[float]:
        """The numbers in the order of the fields, nested ones in place."""
        return [number for field in fields(self) for number in _numbers(getattr(self, field.name))]  # type: ignore[arg-type]

    def unpack(self: T, vector: list[float]) -> T:
        """A value of the same shape with the numbers of `vector`, as `pack` of such a value gives them.

        Raises:
            ValueError: `vector` has not as many numbers as `self`.
        """
        numbers = iter(vector)
        try:
            unpacked: T = _rebuilt(self, numbers)
        except StopIteration:
            raise ValueError(f"{len(vector)} numbers are too few for a {type(self).__name__}") from None
        if next(numbers, None) is not None:
            raise ValueError(f"{len(vector)} numbers are too many for a {type(self).__name__}")
        return unpacked

    def summed(self: T, dist: DistributedContext) -> T:
        """Every number summed over the ranks, in float64. Each rank must call it, with the same shape."""
        return self.unpack(dist.sum(self.pack()))


def _numbers(value: Any) -> Iterator[float]:
    if is_dataclass(value):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    else:
        yield float(value)


def _rebuilt(value: Any, numbers: Iterator[float]) -> Any:
    if is_dataclass(value):
        return type(value)(*[_rebuilt(getattr(value, field.name), numbers) for field in fields(value)])  # type: ignore[misc]
    if isinstance(value, tuple):
        return tuple([_rebuilt(item, numbers) for item in value])  # a generator would turn StopIteration into an error
    return next(numbers)
