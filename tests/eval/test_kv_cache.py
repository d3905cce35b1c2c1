"""Static caches are used again where they fit; which models can have one; where a step is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eval.kv_cache import is_fixable
from eval.static_cache import BLOCK, MAX_IDLE, StaticCachePool, StaticKVCache

CPU = torch.device("cpu")


@pytest.fixture
def pool() -> StaticCachePool:
    return StaticCachePool(None, CPU)


def test_room_is_a_power_of_two_of_blocks(pool: StaticCachePool) -> None:
    assert [pool.take(number).total_positions for number in (1, BLOCK, BLOCK + 1, 5 * BLOCK)] == [
        BLOCK,
        BLOCK,
        2 * BLOCK,
        8 * BLOCK,
    ]


def test_a_cache_is_used_again_where_it_fits_and_is_not_much_too_large(pool: StaticCachePool) -> None:
    large = pool.take(4 * BLOCK)
    large.lengths = [3]
    pool.give(large)
    assert pool.take(BLOCK) is not large, "four times too large"
    assert pool.take(2 * BLOCK) is large
    assert large.lengths == []
    assert pool.take(4 * BLOCK) is not large, "it is in use"


def test_the_smallest_that_fits_is_taken(pool: StaticCachePool) -> None:
    caches = [pool.take(number * BLOCK) for number in (4, 2)]
    for cache in caches:
        pool.give(cache)
    assert pool.take(2 * BLOCK) is caches[1]


def test_the_cache_not_used_for_longest_goes(pool: StaticCachePool) -> None:
    caches = [pool.take(BLOCK) for _ in range(MAX_IDLE + 1)]
    for cache in caches:
        pool.give(cache)
    assert pool._idle == caches[1:]


def test_a_step_computes_a_power_of_two_of_rows_in_slots_of_the_longest_need() -> None:
    cache = StaticKVCache(None, num_rows=6, total_positions=8 * BLOCK, device=CPU)
    assert [cache.num_positions([1] * count) // BLOCK for count in range(7)] == [0, 1, 2, 4, 4, 6, 6]
    assert cache.num_positions([1, BLOCK + 1]) == 4 * BLOCK
    assert cache.num_positions([5 * BLOCK]) == 8 * BLOCK
    assert cache.num_positions([8 * BLOCK]) == 8 * BLOCK


class Linear8bitLt(nn.Linear):
    """Named as bitsandbytes' layer."""


def model(kinds: list[str], layer: nn.Module) -> Any:
    made: Any = nn.Sequential(layer)
    made.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(layer_types=kinds))
    return made


def test_a_sliding_window_and_int8_cannot_be_recorded() -> None:
    assert is_fixable(model(["full_attention"], nn.Linear(2, 2)))
    assert not is_fixable(model(["full_attention", "sliding_attention"], nn.Linear(2, 2)))
    assert not is_fixable(model(["full_attention"], Linear8bitLt(2, 2)))


class Cuda:
    """CUDA with two devices as far as capturing goes: work is recorded only where it runs on the captured device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.captured_on, self.replayed_on = 0, list[int](), list[int]()
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self._replay))
        monkeypatch.setattr(cuda, "Stream", lambda device=None: self._stream(device))
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: self._stream(device))
        monkeypatch.setattr(cuda, "stream", self._nothing)
        monkeypatch.setattr(cuda, "device", self._device)
        monkeypatch.setattr(cuda, "graph", self._graph)

    def _stream(self, device: torch.device | None) -> Any:
        index = self.current if device is None else device.index
        return SimpleNamespace(device_index=index, wait_stream=lambda other: None)

    def _replay(self) -> None:
        self.replayed_on.append(self.current)

    @contextmanager
    def _nothing(self, _stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextmanager
    def _graph(self, _graph: Any, stream: Any = None, capture_error_mode: str = "") -> Iterator[None]:
        first = self.captured_on[0] if self.captured_on else self.current  # torch keeps the first stream for all
        self.captured_on.append(first if stream is None else stream.device_index)
        yield


def test_a_step_is_captured_and_replayed_on_the_models_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each number of rows and size of slots."""
    cuda = Cuda(monkeypatch)
    for index in (0, 1, 0):
        cache: Any = StaticKVCache(None, num_rows=4, total_positions=4 * BLOCK, device=CPU)
        cache._device, cache._slot, cache.lengths = torch.device("cuda", index), BLOCK, [3, 5]
        cache.offsets = [0, -2]  # an image of the second row has fewer positions than tokens
        cache._forward = lambda size: torch.zeros(size, 5)
        for _ in range(2):
            assert cache.step(torch.ones(2, dtype=torch.long)).shape == (2, 5)
        assert cache.lengths == [5, 7]
        assert cache._lengths_R1.flatten().tolist() == [4, 6, 0, 0]
        assert cache._positions_R1.flatten().tolist() == [4, 4, 0, 0]
    assert cuda.captured_on == [0, 1, 0]
    assert cuda.replayed_on == [0, 0, 1, 1, 0, 0]
    assert cuda.current == 0
