"""Rows -> the tensors of one micro-batch.

Owns shifting, positions, segments and padding, and their layout: what a model would otherwise compute on the device, in
every layer, is computed here once.

B rows, L tokens of the longest row, N tokens of all rows without padding, G segments (samples) of all rows, I image
tokens, K targets, T tiles of all rows in order, S the tile's side in pixels, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.sample import Row
from models.images import Images
from models.patch_plan import plan_patches
from models.patches import rope_positions
from models.spec import IGNORE_INDEX, PatchGrid, TextSpec

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Held = TypeVar("Held", bound=DataclassInstance)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PaddedTokens:
    """The tokens of a micro-batch, every row padded at its end to the longest. All int64."""

    input_ids_BL: Tensor
    """Padding is the pad token."""
    targets_BL: Tensor
    """Shifted: the id to be predicted at this position, `IGNORE_INDEX` where none is; never across samples."""
    position_ids_BL: Tensor
    """From 0 in every sample; 0 in padding."""
    segment_ids_BL: Tensor
    """0 is padding; 1, 2, … are the samples of a row, which never attend to each other."""


@dataclass(frozen=True)
class TokenLayout:
    """The positions of tokens, samples, image tokens and targets in a micro-batch."""

    real_N: Tensor
    """int64, which of the B x L positions hold tokens; never empty: a batch of padding keeps one.
    """
    segment_starts_G1: Tensor
    """int32, where each segment begins among the N tokens, and at the end N itself."""
    segment_lengths: tuple[int, ...]
    """The same on the host, as lengths: attention needs the largest without waiting for the device."""
    image_I: Tensor
    """int64, which of the N tokens are image tokens."""
    supervised_K: Tensor
    """int64, at which of the N tokens a target is predicted."""
    target_rows_K: Tensor
    """int64, the row of each target."""
    rope_3N: Tensor | None = None
    """int64, positions by time, row and column, for a model that has them (M-RoPE)."""

    def without_padding(self, values_BL: Tensor) -> Tensor:
        """[B, L] -> [N]: the values at real tokens, sample after sample."""
        return values_BL.flatten()[self.real_N]


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: PaddedTokens
    images: Images
    layout: TokenLayout
    keys: tuple[tuple[str, ...], ...]
    """Per row, the key of each of its samples."""
    shards: tuple[tuple[str, ...], ...]
    """Per row, the shard of each of its samples."""
    num_targets: int
    num_tokens: int
    """Without padding."""
    num_samples: int

    @property
    def num_positions(self) -> int:
        """B x L, padding included."""
        return self.tokens.input_ids_BL.numel()

    @property
    def device(self) -> torch.device:
        """The device that holds the tensors."""
        return self.tokens.input_ids_BL.device

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the batch."""
        return _tensors(self)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to every tensor."""
        return _map_tensors(self, change)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with the computation."""
        return self.map_tensors(Tensor.pin_memory)


def _tensors(value: DataclassInstance) -> Iterator[Tensor]:
    for field in fields(value):
        held = getattr(value, field.name)
        if isinstance(held, Tensor):
            yield held
        elif is_dataclass(held) and not isinstance(held, type):
            yield from _tensors(held)


def _map_tensors(value: Held, change: Callable[[Tensor], Tensor]) -> Held:
    changed: dict[str, Any] = {}
    for field in fields(value):
        held = getattr(value, field.name)
        if isinstance(held, Tensor):
            changed[field.name] = change(held)
        elif is_dataclass(held) and not isinstance(held, type):
            changed[field.name] = _map_tensors(held, change)
    return replace(value, **changed)


def collate(rows: Sequence[Row], text: TextSpec) -> Batch:
    """Pad rows to the longest. An empty row (its slot has run out) is all padding; one position is always kept."""
    length = max([1, *(sum(sample.num_tokens for sample in row) for row in rows)])
    shape = (len(rows), length)
    ids = np.full(shape, text.pad_token_id, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    positions, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for place, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            end = start + sample.num_tokens
            ids[place, start:end] = sample.input_ids
            targets[place, start : end - 1] = sample.labels[1:]
            positions[place, start:end] = np.arange(sample.num_tokens)
            segments[place, start:end] = number
            start = end
    is_image = (ids == text.image_token_id) & (segments != 0)
    return Batch(
        tokens=PaddedTokens(*(torch.from_numpy(each) for each in (ids, targets, positions, segments))),
        images=_images(rows, text.grid),
        layout=replace(_layout(segments, positions, targets, is_image), rope_3N=_rope(rows, text)),
        keys=tuple(tuple(sample.key for sample in row) for row in rows),
        shards=tuple(tuple(sample.shard for sample in row) for row in rows),
        num_targets=int(np.count_nonzero(targets != IGNORE_INDEX)),
        num_tokens=int(np.count_nonzero(segments)),
        num_samples=sum(len(row) for row in rows),
    )


def _layout(segments: Ints, positions: Ints, targets: Ints, is_image: NDArray[np.bool_]) -> TokenLayout:
    """Compute the layout from arrays [B, L]."""
    real = np.flatnonzero(segments)
    if not len(real):
        real = np.zeros(1, dtype=np.int64)
    lengths = np.diff(np.flatnonzero(positions.ravel()[real] == 0), append=len(real)).tolist()
    supervised = np.flatnonzero(targets != IGNORE_INDEX)
    return TokenLayout(
        real_N=torch.from_numpy(real),
        segment_starts_G1=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        segment_lengths=tuple(lengths),
        image_I=torch.from_numpy(np.flatnonzero(is_image.ravel()[real])),
        supervised_K=torch.from_numpy(np.searchsorted(real, supervised)),
        target_rows_K=torch.from_numpy(supervised // segments.shape[1]),
    )


def _rope(rows: Sequence[Row], text: TextSpec) -> Tensor | None:
    """Each sample's positions by time, row and column, one sample after another; one 0 where there is none."""
    if text.grid is None:
        return None
    found = [
        rope_positions(sample.input_ids == text.image_token_id, sample.image_sizes, text.grid)
        for row in rows
        for sample in row
    ]
    return torch.from_numpy(np.concatenate(found, axis=1) if found else np.zeros((3, 1), dtype=np.int64))


def _images(rows: Sequence[Row], grid: PatchGrid | None) -> Images:
    tiles = [sample.tiles for row in rows for sample in row]
    counts = [sum(len(sample.tiles) for sample in row) for row in rows]
    sizes = tuple(size for row in rows for sample in row for size in sample.image_sizes)
    return Images(
        # Without a sample the tile size is unknown.
        tiles_TSSC=torch.from_numpy(np.concatenate(tiles) if tiles else np.zeros((0, 1, 1, 3), dtype=np.uint8)),
        sizes=sizes,
        tile_rows_T=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        plan=None if grid is None else plan_patches(grid, sizes),
    )
