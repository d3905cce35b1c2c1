"""FLOPs and saved bytes of a step, counted exactly on any device, or on tensors without values (meta device).

Owns the two counters: FLOPs by torch's own counter, and the bytes that autograd keeps for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


class SavedBytes:
    """Storages that autograd keeps for a backward, each counted once, without those of `resident` tensors."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        self._resident = {tensor.untyped_storage()._cdata for tensor in resident}
        self._holders: dict[int, int] = {}
        self.total = 0
        """Bytes held now."""

    def hold(self, tensor: Tensor) -> _Held:
        """Autograd saves a tensor for the backward."""
        storage = tensor.untyped_storage()
        held = _Held(self, tensor, 0 if storage._cdata in self._resident else storage.nbytes())
        if not self._holders.get(storage._cdata):
            self.total += held.num_bytes
        self._holders[storage._cdata] = self._holders.get(storage._cdata, 0) + 1
        return held

    def let_go(self, held: _Held) -> None:
        """Autograd has dropped a saved tensor."""
        address = held.tensor.untyped_storage()._cdata
        self._holders[address] -= 1
        if not self._holders[address]:
            self.total -= held.num_bytes


class _Held:
    """The graph's stand-in for a saved tensor; it is freed with the graph."""

    def __init__(self, owner: SavedBytes, tensor: Tensor, num_bytes: int) -> None:
        self.owner, self.tensor, self.num_bytes = owner, tensor, num_bytes

    def __del__(self) -> None:
        self.owner.let_go(self)


@contextmanager
def counting_saved_bytes(module: nn.Module | None = None) -> Iterator[SavedBytes]:
    """Count what is saved for the backward inside, `module`'s own parameters and buffers left out."""
    saved = SavedBytes([*module.parameters(), *module.buffers()] if module is not None else [])
    with torch.autograd.graph.saved_tensors_hooks(saved.hold, lambda held: held.tensor):
        yield saved


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What is counted on a CPU's tensors stands for a GPU, where attention keeps half precision."""
    from models import attention

    widened = attention.WIDENED_DEVICES
    attention.WIDENED_DEVICES = set()
    try:
        yield
    finally:
        attention.WIDENED_DEVICES = widened


def empty_of_values(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with tensors of the same shapes without values, shared where they were shared; on the CPU."""
    made: dict[int, Tensor] = {}
    with mode:
        for each in module.modules():
            kinds: tuple[dict[str, Any], ...] = (each._parameters, each._buffers)
            for kind in kinds:
                for name, tensor in kind.items():
                    if tensor is not None:
                        kind[name] = made.setdefault(id(tensor), _empty_like(tensor))
    return module


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


class _NoModules:
    """Stands for torch's tracker of modules, which cannot follow one that is called inside an autograd Function."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None: ...


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention in `run`.

    Attention on a CPU, which torch's counter leaves out, is counted as its kernel computes it: causally half of the
    pairs, under a mask all of them, and the scores once more in the backward.
    """
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    counter: Any = FlopCounterMode(display=False, custom_mapping=kernels)
    counter.mod_tracker = _NoModules()
    with counter:
        run()
    return int(counter.get_total_flops())


def _pairs(query: Sequence[int], key: Sequence[int], is_causal: bool) -> int:
    """Pairs of a query and a key [B, H, L, d] that attention looks at, times the width of a head."""
    batch, heads, length, width = query
    seen = length * (length + 1) // 2 if is_causal else length * key[2]
    return batch * heads * seen * width


def _attention(*given: Any, **_: Any) -> int:
    """FLOPs of attention from the shapes of query, key and value: two products, scores and weighted values."""
    return 4 * _pairs(given[0], given[1], is_causal=len(given) > 4 and given[4])


def _attention_backward(*given: Any, **_: Any) -> int:
    """The gradient's shape first. The scores again, and gradients of them, values, queries and keys: five products."""
    return 10 * _pairs(given[1], given[2], is_causal=given[7])
