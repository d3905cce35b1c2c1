"""Keys and values in buffers of a fixed size, one slot for a row; on a GPU a step of all rows is a CUDA graph.

    keys of a layer    | row 0: tokens, free | row 1: tokens, free | ... |    a slot has room for the largest need
                                     ^ the step writes each row's next position, and sees what is before it

A step launches some thousand kernels, and launching them takes longer than running them: one row at a time,
Llama-3.1-8B in NF4 writes 30 tokens/s on an H100 (bitsandbytes' benchmarking/README.md), of which reading the weights
takes 1.3 ms per token. With buffers of a fixed size the step of so many rows always runs the same kernels on the same
addresses, so it is recorded once and launched by one call. Rows write at places of their own, so that no row has
padding; which positions it sees is decided by its length. Owns slots, graphs, and a pool of these caches.

B rows, R slots, S positions of a slot, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.kv_cache import DynamicKVCache, KVRow, next_positions
from models.cache_argument import cache_option

BLOCK = 256
"""The smallest slot; larger ones have 2, 4, 8, ... times as many positions, so that few graphs fit all lengths."""

MAX_IDLE = 2
"""Caches that a pool keeps for the next answers; each holds gigabytes for a large model."""


class StaticKVCache:
    """Keys and values of up to `num_rows` rows in `total_positions` positions. See `eval.kv_cache.KVCache`."""

    can_join = True

    def __init__(self, model: Any, *, num_rows: int, total_positions: int, device: torch.device) -> None:
        self.lengths: list[int] = []
        self.offsets: list[int] = []
        self.num_rows, self.total_positions = num_rows, total_positions
        self._model, self._device = model, device
        self._layers: list[_Slots] = []
        self._slot = 0
        self._ids_R1 = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self._lengths_R1, self._positions_R1 = torch.zeros_like(self._ids_R1), torch.zeros_like(self._ids_R1)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @property
    def num_columns(self) -> int:
        """See `KVCache`."""
        return self._batch_size(len(self.lengths)) * self._slot

    def num_positions(self, needs: Sequence[int]) -> int:
        """See `KVCache`: slots of the longest row's need, as many as a step computes."""
        if not needs:
            return 0
        return self._batch_size(len(needs)) * self._slot_size(needs)

    def _batch_size(self, num_rows: int) -> int:
        """Rows that a step computes: 1, 2, 4, ... or as many as there may be."""
        return min(_power_of_two(num_rows), self.num_rows)

    def _slot_size(self, needs: Sequence[int]) -> int:
        return min(BLOCK * _power_of_two(-(-max(needs) // BLOCK)), self.total_positions)

    def join(self, newcomers: DynamicKVCache, needs: Sequence[int]) -> None:
        """See `KVCache`."""
        first = len(self.lengths)
        assert self.num_positions(needs) <= self.total_positions, "the caller counts positions before it admits rows"
        assert len(needs) == first + len(newcomers.lengths)
        if not self._layers:
            self._layers = [_Slots(*pair, self.total_positions) for pair in newcomers.layers()]
        if self._slot_size(needs) != self._slot:
            self._arrange(self._slot_size(needs))
        for slots, pair in zip(self._layers, newcomers.layers(), strict=True):
            for row, length in enumerate(newcomers.lengths):
                slots.fill(first + row, *(each[row, :, each.shape[2] - length :] for each in pair))
        self.lengths, self.offsets = self.lengths + newcomers.lengths, self.offsets + newcomers.offsets

    def _arrange(self, slot: int) -> None:
        """Give slots another size; rows keep their tokens. Memory is taken before anything changes."""
        held = [[slots.row(row, length) for row, length in enumerate(self.lengths)] for slots in self._layers]
        for slots, pairs in zip(self._layers, held, strict=True):
            slots.divide(slot)
            for row, pair in enumerate(pairs):
                slots.fill(row, *pair)
        self._slot = slot

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `KVCache`: the last rows move into the slots that become free."""
        order, last = list(range(len(rows))), sorted(set(rows) - set(range(len(rows))))
        for hole in sorted(set(order) - set(rows)):
            order[hole] = last.pop()
            for slots in self._layers:
                slots.fill(hole, *slots.row(order[hole], self.lengths[order[hole]]))
        self.lengths, self.offsets = [self.lengths[row] for row in order], [self.offsets[row] for row in order]
        return order

    def copy_row(self, row: int) -> KVRow:
        """See `KVCache`."""
        length = self.lengths[row]
        held = [slots.row(row, length) for slots in self._layers]
        return KVRow([tuple(each[None].clone() for each in pair) for pair in held])

    def step(self, ids_B: Tensor) -> Tensor:
        """See `KVCache`. A step that failed has only written where the next one writes."""
        num_rows, size = len(self.lengths), self._batch_size(len(self.lengths))
        self._ids_R1[:num_rows, 0] = ids_B
        blank = [0] * (self.num_rows - num_rows)
        for buffer_R1, values in ((self._lengths_R1, self.lengths), (self._positions_R1, next_positions(self))):
            buffer_R1.copy_(torch.tensor(values + blank)[:, None], non_blocking=True)
        logits_BV = self._forward(size) if self._device.type != "cuda" else self._replayed(size)
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV[:num_rows]

    def _forward(self, size: int) -> Tensor:
        """The step of the first `size` slots: the work that a graph records."""
        lengths_B1 = self._lengths_R1[:size]
        seen_BS = torch.arange(self._slot, device=self._device) <= lengths_B1
        output = self._model(
            input_ids=self._ids_R1[:size],
            position_ids=self._positions_R1[:size],
            attention_mask=seen_BS[:, None, None, :],
            use_cache=True,
            logits_to_keep=1,
            **cache_option(_as_cache([slots.of_step(lengths_B1) for slots in self._layers])),
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _replayed(self, size: int) -> Tensor:
        # Streams, and so what is captured and where it is replayed, belong to the current device, which need not be the
        # model's.
        with torch.cuda.device(self._device):
            graph = self._graphs.get((size, self._slot))
            if graph is None:
                graph = self._graphs[size, self._slot] = self._record(size)
            graph.graph.replay()
        return graph.logits_BV

    def _record(self, size: int) -> _Graph:
        """Run the step a few times, since kernels select algorithms and allocate at first, then record it.

        Each run writes the same positions, so that it may be repeated.
        """
        graph = torch.cuda.CUDAGraph()
        current, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._forward(size)
        current.wait_stream(beside)
        # The stream is given, since torch.cuda.graph keeps one for the whole process, of the device that was current
        # first.
        with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
            logits_BV = self._forward(size)
        return _Graph(graph, logits_BV)


@dataclass
class _Graph:
    """A recorded step, and where it leaves its logits."""

    graph: Any
    logits_BV: Tensor


class _Slots:
    """The buffers of one layer."""

    def __init__(self, keys_BHLW: Tensor, values_BHLW: Tensor, total_positions: int) -> None:
        self._shapes = [each.shape[1::2] for each in (keys_BHLW, values_BHLW)]
        self._flat = [
            each.new_zeros(total_positions * each.shape[1] * each.shape[3]) for each in (keys_BHLW, values_BHLW)
        ]
        self._total = total_positions
        self._pair_RHSW: list[Tensor] = []

    def divide(self, slot: int) -> None:
        """Make slots of so many positions; what was in them is lost."""
        num_slots = self._total // slot
        self._pair_RHSW = [
            flat[: num_slots * slot * heads * width].view(num_slots, heads, slot, width)
            for flat, (heads, width) in zip(self._flat, self._shapes, strict=True)
        ]

    def fill(self, row: int, keys_HLW: Tensor, values_HLW: Tensor) -> None:
        """Write a row's tokens; what an earlier row left behind them is erased, for it need not be finite."""
        for slots_RHSW, new_HLW in zip(self._pair_RHSW, (keys_HLW, values_HLW), strict=True):
            slots_RHSW[row, :, : new_HLW.shape[1]] = new_HLW
            slots_RHSW[row, :, new_HLW.shape[1] :] = 0

    def row(self, row: int, length: int) -> tuple[Tensor, ...]:
        """A copy of a row's keys and values, [H, L, W]."""
        return tuple(slots_RHSW[row, :, :length].clone() for slots_RHSW in self._pair_RHSW)

    def of_step(self, lengths_B1: Tensor) -> _StepLayer:
        """What the model sees of these slots in one step."""
        keys_BHSW, values_BHSW = (slots_RHSW[: len(lengths_B1)] for slots_RHSW in self._pair_RHSW)
        return _StepLayer(keys_BHSW, values_BHSW, lengths_B1)


class _StepLayer:
    """A layer of transformers' `Cache` for one token of each row, which goes to the row's own place."""

    is_compileable, is_sliding, is_initialized = True, False, True

    def __init__(self, keys_BHSW: Tensor, values_BHSW: Tensor, lengths_B1: Tensor) -> None:
        self.keys, self.values = keys_BHSW, values_BHSW
        self._places_B111 = lengths_B1[:, :, None, None]

    def update(self, keys_BH1W: Tensor, values_BH1W: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new token's keys and values, and return those of the whole slots."""
        for slots_BHSW, new_BH1W in ((self.keys, keys_BH1W), (self.values, values_BH1W)):
            slots_BHSW.scatter_(2, self._places_B111.expand_as(new_BH1W), new_BH1W)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """More than 0; positions are given to the model, so that it is used for nothing else."""
        return 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The positions that a mask has, and the first of them."""
        return self.keys.shape[2], 0


def _as_cache(layers: list[_StepLayer]) -> Any:
    from transformers import Cache

    return Cache(layers=layers)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(number - 1, 0).bit_length()


class StaticCachePool:
    """Static caches for one row, reused, since recording a step costs as much as several. Thread-safe."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._idle: list[StaticKVCache] = []
        self._lock = threading.Lock()

    def take(self, need: int) -> StaticKVCache:
        """An empty cache with room for so many positions at least, and for at most twice as many blocks."""
        total_positions = BLOCK * _power_of_two(-(-need // BLOCK))
        with self._lock:
            fitting = [each for each in self._idle if total_positions <= each.total_positions <= 2 * total_positions]
            if fitting:
                cache = min(fitting, key=lambda each: each.total_positions)
                self._idle.remove(cache)
                return cache
        return StaticKVCache(self._model, num_rows=1, total_positions=total_positions, device=self._device)

    def give(self, cache: StaticKVCache) -> None:
        """Return a cache to the pool, empty; beyond the limit the least recently used one is dropped."""
        cache.keep([])
        with self._lock:
            self._idle = [*self._idle, cache][-MAX_IDLE:]
