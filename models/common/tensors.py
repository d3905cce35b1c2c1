"""Tensors by name, wherever they lie: the interface that `models.common.sharded.TensorFiles` has, and a view of it.

files --rename--> the tensors of one part, under the names that the part's class knows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from models.common.errors import InputError


class Tensors(Protocol):
    """Tensors that are read one by one."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor:
        """One tensor, newly allocated; raises InputError where there is none of that name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; nothing is read."""
        ...


class Renamed:
    """Some of the tensors of a directory under other names.

    Args:
        files: where they lie.
        names: a name here -> its name there.
        where: names the directory in errors.
    """

    def __init__(self, files: Tensors, names: Mapping[str, str], where: str) -> None:
        self._files, self._names, self._where = files, names, where

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def read(self, name: str) -> Tensor:
        """See `Tensors`."""
        return self._files.read(self._stored(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        return self._files.shape(self._stored(name))

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise InputError(f"{self._where}: no tensor for {name} in its files; is it another model's directory?")
        return self._names[name]
