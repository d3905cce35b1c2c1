"""Keys and values of the rows of a batch: rows join, take steps together, and leave between two tokens.

    newcomers --DynamicKVCache.read--> logits of their last tokens
                      |
                      '--join--> KVCache --step--> logits of one more token of every row --keep--> fewer rows

Each row has its own length. A newcomer is read in a cache of its own, never beside running rows, and its positions are
counted from its own tokens, so that a row's tokens do not depend on the company it has. Owns the protocol and the cache
that grows; `eval.static_cache` has one of fixed size for a GPU. Does not own what is read, nor which token is chosen.

B rows, L columns of the cache, T new tokens of each row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache_argument import cache_option


@dataclass(frozen=True)
class KVRow:
    """Keys and values of one row without padding, which nobody writes to."""

    layers: Sequence[tuple[Tensor, ...]]
    """Of each layer, [1, heads, L, width of a head]."""

    @property
    def length(self) -> int:
        """The number of tokens, L."""
        return self.layers[0][0].shape[2]

    @property
    def num_bytes(self) -> int:
        """What the keys and values take."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)

    def beginning(self, num_tokens: int) -> KVRow:
        """Its first tokens, in the same memory."""
        assert 0 < num_tokens <= self.length
        return KVRow([tuple(each[:, :, :num_tokens] for each in pair) for pair in self.layers])


class KVCache(Protocol):
    """Keys and values of rows that take their steps together."""

    lengths: list[int]
    """Of each row: how many of its tokens have been read."""
    offsets: list[int]
    """Of each row: what its next position is beyond that number; not 0 behind images with positions by row."""

    @property
    def can_join(self) -> bool:
        """Whether rows may join others; with a sliding window they can only start together."""

    @property
    def num_columns(self) -> int:
        """Rows times positions that one step computes with, padding included."""

    def num_positions(self, needs: Sequence[int]) -> int:
        """The positions that rows take up if each grows to its need, padding included."""

    def join(self, newcomers: DynamicKVCache, needs: Sequence[int]) -> None:
        """Take over the rows of another cache, which is used no more. `needs` are all rows' largest lengths.

        Nothing has changed when it raises.
        """

    def step(self, ids_B: Tensor) -> Tensor:
        """Read one token of each row and return its logits [B, V]. After an error the step may be taken again."""

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Forget all but these rows; returns them in the order that they now have."""

    def copy_row(self, row: int) -> KVRow:
        """One row by itself."""


class DynamicKVCache:
    """Keys and values as transformers keeps them by default, padded on the left to the longest row."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.lengths: list[int] = []
        self.offsets: list[int] = []
        self._model, self._cache = model, DynamicCache(config=model.config)
        self._mask_BL: Tensor | None = None
        """1 at each row's tokens, 0 at padding."""

    @property
    def can_join(self) -> bool:
        """See `KVCache`."""
        return not any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)

    @property
    def num_columns(self) -> int:
        """See `KVCache`."""
        return 0 if self._mask_BL is None else self._mask_BL.numel()

    @property
    def num_bytes(self) -> int:
        """What the keys and values take."""
        return sum(tensor.nbytes for pair in self.layers() for tensor in pair)

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [B, heads, L, width of a head]."""
        return ((layer.keys, layer.values) for layer in self._cache.layers if layer.is_initialized)

    def num_positions(self, needs: Sequence[int]) -> int:
        """See `KVCache`."""
        return len(needs) * max(needs, default=0)

    def read(self, inputs: dict[str, Tensor]) -> Tensor:
        """Read several new tokens of each row, padded on the left, and return the logits [B, V] of the last one.

        `inputs` has input_ids and attention_mask [B, T], and what the model needs for images among them.
        """
        inputs = dict(inputs)
        new_BT = inputs.pop("attention_mask")
        mask_BL = new_BT if self._mask_BL is None else torch.cat([self._mask_BL, new_BT], dim=1)
        positions = inputs.get("position_ids")
        if positions is None or positions.ndim == 2:
            positions_BL = (mask_BL.cumsum(dim=-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_BL[:, -new_BT.shape[1] :]
        logits_BV = self._forward(inputs, mask_BL)
        self._mask_BL, self.lengths = mask_BL, mask_BL.sum(dim=-1).tolist()
        following = self.lengths
        if positions is not None and positions.ndim == 3:
            following = (positions.amax(dim=(0, 2)) + 1).tolist()
        self.offsets = [place - length for place, length in zip(following, self.lengths, strict=True)]
        return logits_BV

    def step(self, ids_B: Tensor) -> Tensor:
        """See `KVCache`."""
        assert self._mask_BL is not None, "there are no rows"
        mask_BL = F.pad(self._mask_BL, (0, 1), value=1)
        positions_B1 = torch.tensor(next_positions(self), device=ids_B.device)[:, None]
        try:
            logits_BV = self._forward({"input_ids": ids_B[:, None], "position_ids": positions_B1}, mask_BL)
        except Exception:
            self._undo(self._mask_BL.shape[1])
            raise
        self._mask_BL, self.lengths = mask_BL, [length + 1 for length in self.lengths]
        return logits_BV

    def join(self, newcomers: DynamicKVCache, needs: Sequence[int]) -> None:
        """See `KVCache`."""
        if self._mask_BL is None:
            self._cache, self._mask_BL, self.lengths = newcomers._cache, newcomers._mask_BL, newcomers.lengths
            self.offsets = newcomers.offsets
            return
        assert newcomers._mask_BL is not None, "newcomers have been read"
        assert self.can_join, "rows with a sliding window start together"
        num_columns = max(self._mask_BL.shape[1], newcomers._mask_BL.shape[1])
        joined = [
            tuple(_stacked(two, num_columns) for two in zip(pair, other, strict=True))
            for pair, other in zip(self.layers(), newcomers.layers(), strict=True)
        ]
        self._replace(joined)
        self.lengths, self.offsets = self.lengths + newcomers.lengths, self.offsets + newcomers.offsets
        self._mask_BL = _mask(self.lengths, self._mask_BL.device, num_columns)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `KVCache`; columns in which all that stay have padding go too."""
        assert self._mask_BL is not None, "there are no rows"
        if not rows:
            self.clear()
            return []
        index = torch.tensor(rows, device=self._mask_BL.device)
        self._cache.batch_select_indices(index)
        self._mask_BL, self.lengths = self._mask_BL[index], [self.lengths[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]
        if self.can_join:
            self._cut(self._mask_BL.shape[1] - max(self.lengths))
        return list(rows)

    def clear(self) -> None:
        """Forget all rows."""
        from transformers import DynamicCache

        self._cache, self._mask_BL, self.lengths = DynamicCache(config=self._model.config), None, []
        self.offsets = []

    def copy_row(self, row: int) -> KVRow:
        """See `KVCache`."""
        assert self._mask_BL is not None, "there are no rows"
        places = slice(self._mask_BL.shape[1] - self.lengths[row], None)
        return KVRow([tuple(each[row : row + 1, :, places].clone() for each in pair) for pair in self.layers()])

    @classmethod
    def of_beginnings(cls, model: Any, known: Sequence[KVRow | None]) -> DynamicKVCache:
        """A row for each, that begins with a copy of what is known of it, or with nothing."""
        cache = cls(model)
        begun = [each.layers if each is not None else () for each in known]
        lengths = [each.length if each is not None else 0 for each in known]
        for place, pair in enumerate(next(filter(None, begun), [])):
            blank = tuple(each[:, :, :0] for each in pair)
            rows = [layers[place] if layers else blank for layers in begun]
            keys, values = (_stacked([row[which] for row in rows], max(lengths)) for which in (0, 1))
            cache._cache.update(keys, values, place)
            cache._mask_BL = _mask(lengths, keys.device)
        cache.lengths = lengths if any(lengths) else []
        cache.offsets = [0] * len(cache.lengths)  # `read` finds the rows' own
        return cache

    def pack(self) -> None:
        """Move padding between a row's tokens to its left, and drop the columns that then have nothing else."""
        assert self._mask_BL is not None, "there are no rows"
        order_BL = self._mask_BL.argsort(dim=1, stable=True)[:, -max(self.lengths) :]
        places_B1L1 = order_BL[:, None, :, None]
        self._replace(
            [
                tuple(each.gather(2, places_B1L1.expand(-1, each.shape[1], -1, each.shape[3])) for each in pair)
                for pair in self.layers()
            ]
        )
        self._mask_BL = _mask(self.lengths, self._mask_BL.device)

    def _forward(self, inputs: dict[str, Any], mask_BL: Tensor) -> Tensor:
        cache = cache_option(self._cache)
        output = self._model(**inputs, attention_mask=mask_BL, use_cache=True, logits_to_keep=1, **cache)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _undo(self, num_columns: int) -> None:
        """Take a step's column away from the layers that have it already."""
        for layer in self._cache.layers:
            if layer.is_initialized and not getattr(layer, "is_sliding", False) and layer.keys.shape[2] > num_columns:
                layer.crop(num_columns - layer.keys.shape[2])

    def _cut(self, num_columns: int) -> None:
        if num_columns > 0:
            assert self._mask_BL is not None
            self._replace([tuple(each[:, :, num_columns:] for each in pair) for pair in self.layers()])
            self._mask_BL = self._mask_BL[:, num_columns:]

    def _replace(self, layers: Sequence[tuple[Tensor, ...]]) -> None:
        held = (layer for layer in self._cache.layers if layer.is_initialized)
        for layer, (keys, values) in zip(held, layers, strict=True):
            layer.keys, layer.values = keys, values


def next_positions(cache: KVCache) -> list[int]:
    """The position of each row's next token."""
    return [length + offset for length, offset in zip(cache.lengths, cache.offsets, strict=True)]


def _stacked(caches: Sequence[Tensor], num_columns: int) -> Tensor:
    """Rows of several caches in one tensor, padded on the left; what stands in padding is never attended to."""
    return torch.cat([F.pad(each, (0, 0, num_columns - each.shape[2], 0)) for each in caches])


def _mask(lengths: Sequence[int], device: torch.device, num_columns: int | None = None) -> Tensor:
    """1 at the last so many columns of each row, 0 at the padding before them."""
    columns = max(lengths) if num_columns is None else num_columns
    first_B1 = torch.tensor([columns - length for length in lengths])[:, None]
    return (torch.arange(columns) >= first_B1).long().to(device)


def is_fixable(model: Any) -> bool:
    """Whether a model's step runs the same kernels every time, so that it can be recorded as a CUDA graph.

    int8 inspects the inputs' outliers, for which the host must wait; a sliding window cannot be moved back.
    """
    text = model.config.get_text_config()
    slides = any("sliding" in kind for kind in getattr(text, "layer_types", None) or ())
    return not slides and all(type(module).__name__ != "Linear8bitLt" for module in model.modules())
