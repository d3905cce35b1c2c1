"""What reads tokens with the keys and values of those before: growing ones, or fixed ones whose step is a CUDA graph.

    tokens --Reader.read--> logits of the last one            Reader.crop(n): only the first n stay read

One row at a time on a GPU, a step launches some thousand kernels, and launching them takes longer than running them:
Llama-3.1-8B in NF4 writes 30 tokens/s on an H100 (bitsandbytes' benchmarking/README.md), of which the weights' bytes
ask for 1.3 ms a token. With keys and values of fixed size the step is always the same kernels on the same addresses, so
that it is recorded once and started by one call. Owns the two readers and a pool of the fixed ones. Does not own what
is read, nor which token is chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 256
"""Fixed readers have room for a multiple of this, so that a few of them fit most chats."""

MAX_IDLE = 2


class Reader(Protocol):
    """Reads the tokens of rows and remembers them."""

    @property
    def capacity(self) -> int:
        """Positions that it has room for."""

    @property
    def can_crop(self) -> bool:
        """Whether `crop` may be called: a window that has moved on cannot be taken back."""

    def read(self, inputs: dict[str, Tensor], mask_BL: Tensor) -> Tensor:
        """Logits [B, V] of the last position. `inputs` has what is new; `mask_BL` has 1 at every real token so far."""

    def crop(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens`."""


class GrowingReader:
    """Keys and values as transformers keeps them by default: any number of rows, any device."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.capacity = 2**31
        self._model, self._cache, self._num_read = model, DynamicCache(config=model.config), 0

    @property
    def can_crop(self) -> bool:
        """See `Reader`."""
        return not any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)

    def read(self, inputs: dict[str, Tensor], mask_BL: Tensor) -> Tensor:
        """See `Reader`."""
        self._num_read = mask_BL.shape[1]
        output = self._model(
            **inputs, attention_mask=mask_BL, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def crop(self, num_tokens: int) -> None:
        """See `Reader`."""
        self._cache.crop(num_tokens - self._num_read)
        self._num_read = num_tokens


class FixedReader:
    """Keys and values in tensors of a fixed size, for one row; on a GPU its step of one token is a CUDA graph."""

    def __init__(self, model: Any, capacity: int, device: torch.device) -> None:
        from transformers import StaticCache

        self.capacity, self.can_crop = capacity, True
        self._model, self._device = model, device
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._num_read = 0
        self._ids_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position_11 = torch.zeros_like(self._ids_11)
        self._seen_111C = torch.zeros(1, 1, 1, capacity, dtype=torch.bool, device=device)
        self._graph: Any = None
        self._graph_logits_1V: Tensor | None = None

    def read(self, inputs: dict[str, Tensor], mask_BL: Tensor) -> Tensor:
        """See `Reader`; the row has no padding, so that the mask says how many tokens there are, and nothing else."""
        num_rows, num_tokens = mask_BL.shape
        assert num_rows == 1, "one row at a time"
        assert num_tokens <= self.capacity, "who makes a reader gives it room"
        is_step = self._num_read > 0 and inputs["input_ids"].shape[1] == 1 and "pixel_values" not in inputs
        logits_1V = self._step(inputs) if is_step else self._prefill(inputs)
        self._num_read = num_tokens
        return logits_1V

    def crop(self, num_tokens: int) -> None:
        """See `Reader`. What lies behind is not looked at, and written over."""
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(num_tokens)
        self._num_read = num_tokens

    def _prefill(self, inputs: dict[str, Tensor]) -> Tensor:
        length, start = inputs["input_ids"].shape[1], self._num_read
        places_C = torch.arange(self.capacity, device=self._device)
        seen_11LC = (places_C <= places_C[start : start + length, None])[None, None]
        return self._forward(seen_11LC, **inputs)

    def _step(self, inputs: dict[str, Tensor]) -> Tensor:
        """The token's id and place go where the graph reads them."""
        self._ids_11.copy_(inputs["input_ids"])
        self._position_11.fill_(self._num_read)
        self._seen_111C[..., : self._num_read + 1] = True
        self._seen_111C[..., self._num_read + 1 :] = False
        if self._device.type != "cuda":
            return self._fixed_forward()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        assert self._graph_logits_1V is not None
        return self._graph_logits_1V

    def _fixed_forward(self) -> Tensor:
        return self._forward(self._seen_111C, input_ids=self._ids_11, position_ids=self._position_11)

    def _capture(self) -> None:
        """Run the step a few times, since kernels choose and allot at their first runs, then record it.

        Each run writes one more place of the cache; `crop` takes that back.
        """
        num_read, graph = self._num_read, torch.cuda.CUDAGraph()
        current, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._fixed_forward()
                self.crop(num_read)
        current.wait_stream(beside)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._graph_logits_1V = self._fixed_forward()
        self._graph = graph
        self.crop(num_read)

    def _forward(self, seen_11LC: Tensor, **inputs: Tensor) -> Tensor:
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        output = self._model(
            **inputs, attention_mask=seen_11LC, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits_1V: Tensor = output.logits[:, -1]
        return logits_1V


class ReaderPool:
    """Fixed readers for one row, used again, since recording a step costs several. Safe to use from several threads."""

    def __init__(self, model: Any, device: torch.device, max_length: int) -> None:
        self._model, self._device, self._max_length = model, device, max_length
        self._idle: list[FixedReader] = []
        self._lock = threading.Lock()

    def take(self, num_positions: int) -> FixedReader:
        """A reader that has read nothing, with room for at least `num_positions`, and for not many more."""
        capacity = min(-(-num_positions // BLOCK) * BLOCK, max(self._max_length, num_positions))
        with self._lock:
            fitting = [reader for reader in self._idle if capacity <= reader.capacity <= 2 * capacity]
            if fitting:
                reader = min(fitting, key=lambda each: each.capacity)
                self._idle.remove(reader)
                reader.crop(0)
                return reader
        return FixedReader(self._model, capacity, self._device)

    def give(self, reader: FixedReader) -> None:
        """Give back a reader that is not needed any more; the one not used for longest goes."""
        with self._lock:
            self._idle = [*self._idle, reader][-MAX_IDLE:]


def is_fixable(model: Any) -> bool:
    """Whether a model's step is the same kernels every time.

    int8 looks at the inputs' outliers on the way, which the host must wait for; a sliding window cannot be taken back.
    """
    text = model.config.get_text_config()
    slides = any("sliding" in kind for kind in getattr(text, "layer_types", None) or ())
    return not slides and all(type(module).__name__ != "Linear8bitLt" for module in model.modules())


MakeReader = Callable[[int], Reader]
"""A reader with room for so many positions."""
