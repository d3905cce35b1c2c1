"""Counts the bytes of tensors that are alive in this thread, and their peak, from the operations that make them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While it is on: `now`, the bytes of storages that an operation has returned and somebody still holds; `peak`.

    A storage counts whole and once, mapped files' too, and not if nothing was computed with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._count(value)
        return found

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = 0
            weakref.finalize(storage, self._drop, key)
        self.now += size - self._alive[key]
        self._alive[key] = size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)
