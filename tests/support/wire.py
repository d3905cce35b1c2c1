"""Counts the bytes that a rank's collectives move, by kind, below torch.distributed: whoever calls it, however."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GATHERS = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "allgather_coalesced_")
REDUCTIONS = ("reduce_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")


class Wire(TorchDispatchMode):
    """Bytes by kind while it is on: `gathered`, `reduced`, `other`; an all-reduce is a reduction and a gathering.

    Whole tensors count: of n ranks each sends and receives (n - 1) / n of that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        self.names[name] += 1
        size = max((_bytes(_tensors(each)) for each in args[:2]), default=0)  # of input and output the whole one
        if name in GATHERS or name.startswith("allreduce"):
            self.num_bytes["gathered"] += size
        if name in REDUCTIONS or name.startswith("allreduce"):
            self.num_bytes["reduced"] += size
        elif name not in GATHERS:
            self.num_bytes["other"] += size


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
